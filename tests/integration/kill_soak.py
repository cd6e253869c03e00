"""Kill and signal runs at random moments, start them again each time, and check what they leave: a soak.

    python -m tests.integration.kill_soak --faults 100 --seed 0 --output DIR

A *life* is one run directory, from an empty one to a finished model. In each start of it one fault is given: a signal
or a kill, to one process or to all, while it starts, trains or ends; some starts are of a run that is finished
already. After each one these must hold:

* No process is left, and every start ends within `SECONDS_TO_END` of its fault.
* A finished model, its metrics and its checkpoints are never lost and never changed.
* `done` in `status.json`, and exit code 0 of a start without a launcher in between, only with a whole `hf/`.
* A life that has come to its end has led to the very bits of a run that nothing had happened to.

The faults follow from the seed; the moments within the machine's speed.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from tests.distributed.ranks import free_port
from tests.distributed.runs import checkpoint
from tests.integration.jobs import Site, assert_same_outcome

ROOT = Path(__file__).resolve().parents[2]
MARK = "EBFT_SOAK"  # environment variable by which every process of a start is found
STEPS = 16
SETTINGS = (f"train.max_steps={STEPS}", "checkpoint.interval=4")
SECONDS_TO_START, SECONDS_TO_END = 240, 90
LONGEST_START, LONGEST_END = 9.0, 2.5  # seconds within which a fault comes after the start, and after the last step
LAUNCHERS = {1: ("none", "deepspeed", "torchrun"), 2: ("deepspeed", "torchrun")}  # by the number of ranks
# Two interrupts: the second one ends the process at once.
FAULTS = (("INT",), ("INT", "INT"), ("TERM",), ("HUP",), ("USR1",), ("KILL",))
# USR1 ends a launcher, and KILL leaves the ranks without one: they have to notice.
VICTIMS = ("everybody", "rank", "any", "started")
MOMENTS = ("start", "start", "training", "training", "end")


@dataclass(frozen=True)
class Fault:
    """What happens to one start of a run."""

    launcher: str
    moment: str
    signals: tuple[str, ...]
    victim: str
    after: float  # share of the time, 0 to 1, that the moment lasts
    tokenizes: bool  # the data is text

    def __str__(self) -> str:
        data = ", tokenizing" if self.tokenizes else ""
        return f"{'+'.join(self.signals)} to {self.victim} of {self.launcher} at {self.moment} {self.after:.2f}{data}"


@dataclass(frozen=True)
class Life:
    """A run directory, and what stays the same in all its starts."""

    output: Path
    cache: Path
    ranks: int  # the layout decides how sums are rounded
    tokenizes: bool  # its data is text, which the first start that gets so far tokenizes


@dataclass
class Tally:
    """What has happened so far."""

    faults: int = 0
    kinds: Counter = field(default_factory=Counter)
    outcomes: Counter = field(default_factory=Counter)
    lives: int = 0
    problems: list[str] = field(default_factory=list)


def random_fault(choice: random.Random, life: "Life", finished: bool) -> Fault:
    """The next fault; one at a run that is finished already has the moment `finished`."""
    moment = "finished" if finished else choice.choice(MOMENTS)
    launcher = choice.choice(LAUNCHERS[life.ranks])
    victims = VICTIMS if launcher != "none" else VICTIMS[:2]
    return Fault(launcher, moment, choice.choice(FAULTS), choice.choice(victims), choice.random(), life.tokenizes)


class Start:
    """One start of a run, with all its processes."""

    def __init__(self, site: Site, life: Life, number: int, launcher: str):
        self.token = f"{os.getpid()}-{number}"
        self.console = site.directory / f"console-{number}.txt"
        programs = Path(sys.executable).parent
        ranks, port = str(life.ranks), str(free_port())
        command = {
            "none": [sys.executable],
            "deepspeed": [str(programs / "deepspeed"), "--num_gpus", ranks, "--master_port", port],
            "torchrun": [str(programs / "torchrun"), "--nproc-per-node", ranks, "--master-port", port],
        }[launcher]
        texts = (f"data.shards={site.directory / 'texts'}", f"data.tokenizer={site.directory / 'tokenizer'}")
        overrides = (*SETTINGS, f"data.cache={life.cache}", *(texts if life.tokenizes else ()))
        environment = {MARK: self.token, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        environment["PATH"] = f"{programs}:{os.environ['PATH']}"
        with self.console.open("wb") as stream:
            self.process = subprocess.Popen(
                [*command, str(ROOT / "launcher" / "train.py"), *site.arguments(life.output, overrides)],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                process_group=0,
                cwd=ROOT,
            )

    @property
    def said(self) -> str:
        """What was printed so far."""
        return self.console.read_text(errors="replace")

    def printed_traceback(self) -> bool:
        """Whether a process of this program has printed a traceback; the launchers print theirs."""
        traces = self.said.split("Traceback (most recent call last)")[1:]
        return any(f'File "{ROOT / part}' in trace for trace in traces for part in ("ebft_mega", "launcher"))

    def everybody(self) -> list[psutil.Process]:
        """All processes of this start that run, found by their environment."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.token:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def victims(self, kind: str, choice: random.Random) -> list[psutil.Process]:
        """The processes that a fault is given to."""
        everybody = self.everybody()
        if kind == "started":
            return [process for process in everybody if process.pid == self.process.pid]
        if kind == "rank":
            everybody = [process for process in everybody if _is_rank(process)] or everybody
        return everybody if kind == "everybody" else choice.sample(everybody, min(1, len(everybody)))

    def wait_for(self, words: str) -> None:
        """Until something is printed, or the start has ended."""
        deadline = time.monotonic() + SECONDS_TO_START
        while words not in self.said and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)

    def end(self) -> tuple[int | None, list[str]]:
        """The exit code, and what is wrong: processes that are left after a while, which are then killed."""
        deadline = time.monotonic() + SECONDS_TO_END
        while self.everybody() and time.monotonic() < deadline:
            time.sleep(0.1)
        left = self.everybody()
        for process in left:
            process.kill()
        words = [f"left after {SECONDS_TO_END} s: {process.pid} {' '.join(process.cmdline()[-3:])}" for process in left]
        try:
            return self.process.wait(10), words
        except subprocess.TimeoutExpired:
            return None, [*words, "the command did not end"]


def _is_rank(process: psutil.Process) -> bool:
    try:
        return any(part.endswith("launcher/train.py") for part in process.cmdline()[:3])
    except psutil.Error:
        return False


def give(fault: Fault, start: Start, choice: random.Random) -> None:
    """Wait for the moment of a fault, and give it."""
    if fault.moment in ("start", "finished"):
        time.sleep(fault.after * LONGEST_START)
    elif fault.moment == "training":
        start.wait_for(f"step {1 + int(fault.after * (STEPS - 1))}/{STEPS}")
    else:
        start.wait_for(f"step {STEPS}/{STEPS}")
        time.sleep(fault.after * LONGEST_END)
    for number, name in enumerate(fault.signals):
        if number:
            time.sleep(0.3)
        for victim in start.victims(fault.victim, choice):
            try:
                victim.send_signal(signal.Signals[f"SIG{name}"])
            except psutil.NoSuchProcess:
                continue


def result_of(output: Path) -> dict[str, str]:
    """Names and hashes of what must never be lost: the final model, the metrics and the newest checkpoint."""
    last = checkpoint(output, STEPS)
    paths = [output / "metrics.jsonl", *sorted((output / "hf").rglob("*")), *sorted(last.rglob("*"))]
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()
    }


def is_finished(output: Path) -> bool:
    """Whether there is a model whose weights can be read whole."""
    from safetensors import SafetensorError, safe_open

    try:
        json.loads((output / "hf" / "config.json").read_text())
        with safe_open(output / "hf" / "model.safetensors", "pt") as file:
            return len([file.get_tensor(name) for name in file.keys()]) > 3  # noqa: SIM118 (it is no dictionary)
    except (OSError, ValueError, SafetensorError):
        return False


def problems_of(output: Path, code: int | None, fault: Fault, before: dict[str, str]) -> Iterator[str]:
    """What a start has left that must not be."""
    whole = is_finished(output)
    state = status_of(output)
    if state == "done" and not whole:
        yield "status.json says done without a whole hf/"
    if code == 0 and fault.launcher == "none" and not whole:
        yield "exit code 0 without a whole hf/"
    if state == "done" and not (output / "report.html").is_file():
        yield "status.json says done without a report"
    if before:
        after = result_of(output)
        lost = sorted(name for name, digest in before.items() if after.get(name) != digest)
        if lost:
            yield f"a finished result was lost or changed: {lost}"


def status_of(output: Path) -> str | None:
    """What `status.json` says; None if there is none."""
    try:
        return json.loads((output / "status.json").read_text())["state"]
    except FileNotFoundError:
        return None


def text_shards(directory: Path) -> Path:
    """A webdataset of raw text, which takes seconds to tokenize."""
    directory.mkdir()
    library = Path(sysconfig.get_paths()["stdlib"])
    with tarfile.open(directory / "part-0.tar", "w") as shard:
        for number, path in enumerate(sorted(library.glob("*.py"))[:60]):
            shard.add(path, f"{number}.txt")
    return directory


def soak(faults: int, seed: int, directory: Path) -> Tally:
    """Give so many faults; what went wrong is in the tally's `problems`."""
    choice = random.Random(seed)
    site, tally = Site.made_in(directory), Tally()
    text_shards(directory / "texts")
    clean: dict[tuple[int, bool], Path] = {}
    numbers = itertools.count(1)
    while tally.faults < faults:
        name = f"life-{tally.lives}"
        life = Life(directory / name, directory / f"{name}-cache", choice.choice((1, 2)), choice.random() < 0.4)
        tally.lives += 1
        kind = life.ranks, life.tokenizes
        if kind not in clean:
            undisturbed = replace(
                life, output=directory / f"clean-{life.ranks}-{life.tokenizes}", cache=directory / "cache"
            )
            code, wrong = Start(site, undisturbed, next(numbers), "torchrun").end()
            assert code == 0 and not wrong and is_finished(undisturbed.output), (code, wrong)
            clean[kind] = undisturbed.output
        live(site, life, faults, choice, tally, numbers)
        wrong = come_to_the_end(site, life, next(numbers), clean[kind])
        tally.problems += [f"{life.output.name}, at its end: {words}" for words in wrong]
    return tally


def live(site: Site, life: Life, faults: int, choice: random.Random, tally: Tally, numbers: Iterator[int]) -> None:
    """Give faults to the starts of a run, until it is finished and for some more."""
    output, finished = life.output, False
    while tally.faults < faults and not (finished and choice.random() < 0.5):
        fault = random_fault(choice, life, finished)
        before = result_of(output) if finished else {}
        start = Start(site, life, next(numbers), fault.launcher)
        give(fault, start, choice)
        code, wrong = start.end()
        tally.faults += 1
        tally.kinds[fault.moment, "+".join(fault.signals)] += 1
        tally.outcomes[fault.launcher, code, status_of(output)] += 1
        wrong += problems_of(output, code, fault, before)
        wrong += ["a traceback was printed"] * start.printed_traceback()
        tally.problems += [f"{tally.faults} ({output.name}, {fault}): {words}" for words in wrong]
        outcome = "; ".join([f"exit code {code}, status {status_of(output)}", *wrong])
        print(f"{tally.faults}/{faults} {output.name} {start.console.name} {fault}: {outcome}", flush=True)
        finished = is_finished(output)


def come_to_the_end(site: Site, life: Life, number: int, clean: Path) -> list[str]:
    """Start a run once more, without a fault, and compare it with the one that nothing had happened to."""
    code, wrong = Start(site, life, number, "torchrun").end()
    if code != 0 or status_of(life.output) != "done":
        wrong.append(f"the last start ended with {code}, {status_of(life.output)}")
    if wrong:
        return wrong
    try:
        assert_same_outcome(clean, life.output, STEPS)
    except AssertionError as error:
        return [f"other bits than without faults: {str(error)[:300]}"]
    return [] if (life.output / "report.html").is_file() else ["no report"]


def main() -> int:
    """Soak, and print what was counted; exit code 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="a new directory")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True)
    started = time.monotonic()
    tally = soak(arguments.faults, arguments.seed, arguments.output)
    for kind, count in sorted(tally.kinds.items()):
        print(f"{count:4d} x {kind[1]} at {kind[0]}")
    for outcome, count in sorted(tally.outcomes.items(), key=str):
        print(f"{count:4d} x launcher {outcome[0]}, exit code {outcome[1]}, status {outcome[2]}")
    print(f"{tally.faults} faults in {tally.lives} lives, {time.monotonic() - started:.0f} s")
    for problem in tally.problems:
        print(f"PROBLEM {problem}")
    return 1 if tally.problems else 0


if __name__ == "__main__":
    sys.exit(main())
