"""Run commands one after the other: timed, skipped when nothing changed, stopped at the first failure."""

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from ebft_mega.errors import EbftError, InputError
from ebft_mega.io.contained_files import read_contained_json
from ebft_mega.io.durable import write_json
from ebft_mega.io.process_signals import uninterrupted
from ebft_mega.metrics.console import format_duration
from ebft_mega.runtime.run_files import STATUS_NAME


class PhaseFailed(EbftError):
    """A command ended with an error; `exit_code` is the command's own."""

    def __init__(self, name: str, command: Sequence[str], exit_code: int, reason: str):
        super().__init__(f"phase {name!r} failed ({reason}); its command was: {shlex.join(command)}")
        self.exit_code = exit_code


@dataclass(frozen=True)
class Outcome:
    """How a phase ended."""

    name: str
    seconds: float
    reused: bool

    @property
    def text(self) -> str:
        """Its duration, or "reused" if it did not run."""
        return "reused" if self.reused else format_duration(self.seconds)


@dataclass
class PhaseRunner:
    """Run the phases of an experiment and record how long each took.

    Args:
        root: directory in which the commands run.
        say: where progress lines go.
        environment: variables set for every command, beside this process's own.
        fresh: never reuse what an earlier run left behind.
    """

    root: Path
    say: Callable[[str], None] = print
    environment: Mapping[str, str] = field(default_factory=dict)
    fresh: bool = False
    outcomes: list[Outcome] = field(default_factory=list)
    _made: set[Path] = field(default_factory=set)

    def run(self, name: str, command: Sequence[str], status_of: Path | None = None) -> float:
        """Run a command to its end; its output goes to the output of this process.

        Args:
            name: of the phase, for people.
            command: program and arguments.
            status_of: run directory whose `status.json` decides about success, because a launcher may change
                its processes' exit codes. That of an earlier run is deleted first.
        Returns:
            Wall seconds.
        Raises:
            PhaseFailed: the command could not be started, failed, or left no `done` in `status.json`.
        """
        self.say(f"\n== {name}: {shlex.join(command)}")
        if status_of is not None:
            (status_of / STATUS_NAME).unlink(missing_ok=True)
        started = time.monotonic()
        process = None
        try:
            with uninterrupted():  # a process that nobody knows could not be asked to stop
                process = subprocess.Popen(command, cwd=self.root, env={**os.environ, **self.environment})
            code = process.wait()
        except OSError as error:
            raise PhaseFailed(name, command, 1, str(error)) from None
        except BaseException:  # a signal to this process
            if process is not None:
                ask_to_stop(process.pid)
            raise
        seconds = time.monotonic() - started
        if status_of is None:
            if code != 0:
                raise PhaseFailed(name, command, code if code > 0 else 1, f"exit code {code}")
        else:
            self._check_status(name, command, status_of, code)
        self.outcomes.append(Outcome(name, seconds, reused=False))
        return seconds

    def run_once(
        self,
        name: str,
        command: Sequence[str],
        output: Path,
        inputs: Mapping[str, Any],
        status_of: Path | None = None,
    ) -> str:
        """Run a command unless its output already exists and was made from the same inputs.

        Args:
            name, command, status_of: as in `run`.
            output: directory that the command makes; removed before the command runs, unless it is a run directory
                (`status_of`), whose results the launcher sets aside.
            inputs: everything that the output depends on, as plain JSON values.
        Returns:
            Fingerprint of the inputs, for the inputs of phases that use this output.
        Raises:
            PhaseFailed: as in `run`.
        """
        stamp = inputs_stamp(output)
        fingerprint = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        reason = self._why_not_reusable(output, stamp, inputs)
        if not reason:
            self.say(f"\n== {name}: reused {output} (made from the same inputs)")
            self.outcomes.append(Outcome(name, 0.0, reused=True))
            return fingerprint
        self.say(f"\n== {name}: {reason}")
        stamp.unlink(missing_ok=True)
        if status_of is None:
            remove_directory(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        self.run(name, command, status_of)
        write_json(stamp, dict(inputs))
        self._made.add(output)
        return fingerprint

    def summary(self) -> str:
        """Wall time of every phase and of all together, one line each."""
        width = max((len(outcome.name) for outcome in self.outcomes), default=5)
        lines = [f"  {outcome.name:<{width}}  {outcome.text:>8}" for outcome in self.outcomes]
        total = sum(outcome.seconds for outcome in self.outcomes)
        return "\n".join([*lines, f"  {'total':<{width}}  {format_duration(total):>8}"])

    def _why_not_reusable(self, output: Path, stamp: Path, inputs: Mapping[str, Any]) -> str:
        """The reason to run a phase again; empty if its output can be reused."""
        if self.fresh and output not in self._made:
            return "a fresh start was asked for"
        if not output.is_dir() or not stamp.exists():
            return f"no finished {output} yet"
        try:
            before = read_contained_json(stamp.parent, stamp.name, "the inputs that a phase was run with")
        except InputError:
            return f"made again, because {stamp} cannot be read"
        after = json.loads(json.dumps(dict(inputs)))
        changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
        return f"made again, because these inputs changed: {', '.join(changed)}" if changed else ""

    def _check_status(self, name: str, command: Sequence[str], directory: Path, code: int) -> None:
        path = directory / STATUS_NAME
        if not path.exists():
            raise PhaseFailed(name, command, code if code > 0 else 1, f"exit code {code}, no {path}")
        try:
            status = read_contained_json(directory, STATUS_NAME, "the outcome of a run")
        except InputError as error:
            raise PhaseFailed(name, command, code if code > 0 else 1, str(error)) from error
        if status.get("state") != "done":
            reason = f"state {status.get('state')!r} after step {status.get('step')}; see {directory / 'logs'}"
            recorded = status.get("exit_code")
            raise PhaseFailed(name, command, recorded if type(recorded) is int and 0 < recorded < 256 else 1, reason)


def inputs_stamp(output: Path) -> Path:
    """Where it stands what `PhaseRunner.run_once` has made a directory from."""
    return output.parent / f".{output.name}.inputs.json"


def ask_to_stop(pid: int) -> None:
    """Send SIGTERM to a process and to all that it has started: launchers may end without a word to their ranks."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for member in (*process.children(recursive=True), process):
            with contextlib.suppress(psutil.NoSuchProcess):
                member.terminate()


def remove_directory(path: Path) -> None:
    """Remove the directory that an earlier run left at `path`, if there is one."""
    if path.exists():
        shutil.rmtree(path)


def source_fingerprint(paths: Iterable[Path]) -> str:
    """One sha256 over the Python and YAML files at or below some paths, names included.

    Args:
        paths: files or directories.
    """
    digest = hashlib.sha256()
    for path in paths:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.suffix in (".py", ".yaml"):
                digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
