"""Run the jobs of many trials at a time on this machine, each with a log, a stamp and a line when it is done."""

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ebft_mega.apps.experiment.running.phases import ask_to_stop
from ebft_mega.apps.experiment.runs.jobs import Chain, Job
from ebft_mega.apps.experiment.runs.stamps import Stamp, Start, read_stamp, write_stamp
from ebft_mega.errors import EXIT_STOPPED, EbftError
from ebft_mega.io.expanded_paths import REPOSITORY
from ebft_mega.io.process_signals import SHELL_OFFSET, uninterrupted
from ebft_mega.metrics.console import format_duration
from ebft_mega.runtime.run_files import STATUS_NAME, failure_on_record, stop_on_record

LOOK_SECONDS = 0.05  # between two looks at the processes
LEAVE_SECONDS = 2.5  # that children have to save and end when this process is asked to stop
TAIL_LINES, TAIL_BYTES = 15, 16_384  # of a failed job's log


class JobFailed(EbftError):
    """A job's command failed; `exit_code` is the command's own."""

    def __init__(self, job: Job, exit_code: int):
        reason = f"exit code {exit_code}"
        if exit_code == EXIT_STOPPED:
            reason = "it was stopped; the same command resumes it"
        super().__init__(f"{job.name}: failed ({reason}); the end of {job.log}:\n{log_tail(job.log)}")
        self.exit_code = exit_code if 0 < exit_code < 256 else 1


def log_tail(path: Path) -> str:
    """The last lines of a log; nothing where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return "\n".join(f"  {line}" for line in lines[-TAIL_LINES:])


@dataclass
class _Running:
    chain: Chain
    waiting: list[Job]
    job: Job
    stamp: Stamp
    process: subprocess.Popen[bytes]
    started: float
    seconds: dict[str, float] = field(default_factory=dict)  # of the chain's jobs so far, by kind


@dataclass
class JobPool:
    """Run chains of jobs.

    Args:
        jobs: chains at a time.
        say: where progress lines go.
        environment: variables for every command, beside this process's own.
        root: directory in which the commands run.
    """

    jobs: int
    say: Callable[[str], None] = print
    environment: Mapping[str, str] = field(default_factory=dict)
    root: Path = REPOSITORY
    _running: list[_Running] = field(default_factory=list)
    _seconds: list[float] = field(default_factory=list)  # of the chains that were run

    def run(self, chains: Sequence[Chain]) -> None:
        """Run what is not done yet of all chains; a job that was interrupted is started again, and resumes by itself.

        Raises:
            JobFailed: the first job that failed; the others that were running then have ended.
        """
        waiting = [chain for chain in chains if not all(job.is_done() for job in chain.jobs)]
        done, total, failure = len(chains) - len(waiting), len(chains), None
        if done:
            self.say(f"{done} of {total} were done before")
        try:
            while waiting or self._running:
                while waiting and len(self._running) < self.jobs and failure is None:
                    chain = waiting.pop(0)
                    self._start(chain, [job for job in chain.jobs if not job.is_done()], {})
                if failure is not None and not self._running:
                    break
                for each in [each for each in self._running if self._has_ended(each)]:
                    self._running.remove(each)
                    try:
                        self._follow(each, failure is None)
                    except JobFailed as error:
                        failure = failure or error
                        self.say(f"{each.job.name}: failed" + "; no more are started" * bool(waiting))
                    else:
                        done += not any(one.chain is each.chain for one in self._running)
                        if not any(one.chain is each.chain for one in self._running):
                            self._tell(each, done, total)
                time.sleep(LOOK_SECONDS)
        except BaseException:  # a signal to this process
            self._stop()
            raise
        if failure is not None:
            raise failure

    def _start(self, chain: Chain, jobs: list[Job], seconds: dict[str, float]) -> None:
        job, *rest = jobs
        stamp = read_stamp(job.output) or Stamp(inputs={})
        before = stamp.starts if stamp.inputs == job.inputs else ()
        # If nobody is there to note the end of this start, what it has used is not known.
        begun = Start(wall_seconds=0.0, cpu_seconds=None, exit_code=None)
        stamp = Stamp(inputs=dict(job.inputs), starts=(*before, begun))
        job.log.parent.mkdir(parents=True, exist_ok=True)
        if job.kind == "train":
            (job.output / STATUS_NAME).unlink(missing_ok=True)  # the outcome of an earlier start
        write_stamp(job.output, stamp)
        environment = {**os.environ, **self.environment}
        with uninterrupted(), job.log.open("ab") as log:  # a process that nobody knows could not be asked to stop
            try:
                process = subprocess.Popen(
                    job.command(),
                    cwd=self.root,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            except OSError as error:
                log.write(f"{error}\n".encode())
                log.flush()
                raise JobFailed(job, 1) from None
            self._running.append(_Running(chain, rest, job, stamp, process, time.monotonic(), seconds))

    def _has_ended(self, each: _Running) -> bool:
        """Note the end of a process, and what it and its children have used."""
        with uninterrupted():
            pid, status, usage = os.wait4(each.process.pid, os.WNOHANG)
            if pid == 0:
                return False
            code = each.process.returncode = os.waitstatus_to_exitcode(status)
            seconds = time.monotonic() - each.started
            start = Start(wall_seconds=seconds, cpu_seconds=usage.ru_utime + usage.ru_stime, exit_code=code)
            is_done = code == 0 and each.job.has_result()
            changes: dict[str, Any] = {"starts": (*each.stamp.starts[:-1], start), "is_done": is_done}
            each.stamp = each.stamp.model_copy(update=changes)
            write_stamp(each.job.output, each.stamp)
            each.job.settle(each.stamp)
            each.seconds[each.job.kind] = each.seconds.get(each.job.kind, 0.0) + seconds
            return True

    def _follow(self, each: _Running, may_start: bool) -> None:
        """Start the next job of a chain.

        Raises:
            JobFailed: the job that has ended has failed.
        """
        if not each.stamp.is_done:
            raise JobFailed(each.job, _code_of(each))
        if each.waiting and may_start:
            self._start(each.chain, each.waiting, each.seconds)

    def _tell(self, each: _Running, done: int, total: int) -> None:
        self._seconds.append(sum(each.seconds.values()))
        parts = ", ".join(f"{kind} {format_duration(seconds)}" for kind, seconds in each.seconds.items())
        left = total - done
        mean = sum(self._seconds) / len(self._seconds)
        about = f", about {format_duration(mean * left / self.jobs)}" if left else ""
        self.say(f"{done} of {total}: {each.chain.name}: {parts}; {left} left{about}")

    def _stop(self) -> None:
        """Ask all children to stop, and give them a moment to save."""
        for each in self._running:
            ask_to_stop(each.process.pid)
        deadline = time.monotonic() + LEAVE_SECONDS
        while self._running and time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):
                self._running = [each for each in self._running if not self._has_ended(each)]
            time.sleep(LOOK_SECONDS)


def _code_of(each: _Running) -> int:
    """The exit code of a process that has failed; of a run what its ranks have recorded, as launchers change codes."""
    recorded = None
    if each.job.kind == "train":
        recorded = failure_on_record(each.job.output) or stop_on_record(each.job.output)
    code = each.process.returncode
    return recorded or (SHELL_OFFSET - code if code < 0 else code) or 1
