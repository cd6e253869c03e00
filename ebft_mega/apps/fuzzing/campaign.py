"""Search for input that a parser neither takes nor refuses: run many cases, and say what became of them.

A case is a pure function of parser, seed and number, so that one case alone can be run again.
"""

import contextlib
import random
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from ebft_mega.apps.fuzzing.fuzzed_parsers import FuzzedParser
from ebft_mega.apps.fuzzing.valid_files import write_files
from ebft_mega.apps.fuzzing.watched_writes import WatchedWrites
from ebft_mega.errors import DamagedDataError, InputProblems
from ebft_mega.shown_text import escaped

SLOW_SECONDS = 5.0
MAX_GROWTH_BYTES = 512 * 2**20
MAX_MESSAGE_CHARACTERS = 200_000
MAX_FAILURES = 10  # of a parser; the rest would repeat them
CURRENT_NAME = "current"  # what a process was at that a library has crashed
LEAST_SHARE = 1 / 3  # of cases that pass the first stage
_KIBIBYTE = 1024
_STATUS = Path("/proc/self/status")  # Linux


class SlowCase(BaseException):  # noqa: N818 (no error), and no Exception, so that no parser takes it
    """A case takes longer than `SLOW_SECONDS`."""


@dataclass(frozen=True)
class Failure:
    """A case that is neither taken nor refused."""

    parser: str
    seed: int
    number: int
    what: str
    changed: dict[str, bytes]  # the files that are not valid any more

    def __str__(self) -> str:
        return f"{self.parser}: case {self.number} of seed {self.seed} ({', '.join(self.changed)}): {self.what}"


@dataclass
class Tally:
    """What became of the cases of one parser."""

    parser: str
    cases: int = 0
    past_first_stage: int = 0
    accepted: int = 0
    refused: int = 0
    slowest_seconds: float = 0.0
    growth_bytes: int = 0  # of the process's peak memory
    seconds: float = 0.0
    failures: list[Failure] = field(default_factory=list)
    last_refusal: str = ""  # its message

    @property
    def share(self) -> float:
        """Share of the cases that pass the first stage."""
        return self.past_first_stage / max(1, self.cases)

    def add(self, other: "Tally") -> None:
        """Take in what another process has counted."""
        for name in ("cases", "past_first_stage", "accepted", "refused"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("slowest_seconds", "growth_bytes", "seconds"):
            setattr(self, name, max(getattr(self, name), getattr(other, name)))
        self.failures += other.failures
        self.last_refusal = other.last_refusal or self.last_refusal


def run_cases(parser: FuzzedParser, seed: int, numbers: Sequence[int], scratch: Path, watch: WatchedWrites) -> Tally:
    """Run cases of one parser, in this process.

    Args:
        numbers: of the cases.
        scratch: a directory for their files; the parser's own is in it, and nothing else is written.
        watch: notes what is written elsewhere.
    """
    tally = Tally(parser.name)
    place = scratch / "case"
    shutil.rmtree(place, ignore_errors=True)
    valid = dict(parser.files())
    write_files(place, valid)
    parser.read(place)  # what is valid is read, and imports are not counted with the first case
    peak = _peak_bytes()
    began = time.perf_counter()
    current = scratch / CURRENT_NAME
    for number in numbers:
        current.write_text(f"{parser.name} {seed} {number}\n")
        changed = changed_files(parser, valid, seed, number)
        write_files(place, changed)
        tally.past_first_stage += parser.passes_first_stage(changed)
        started = time.perf_counter()
        found, message = _outcome(parser, place, watch)
        seconds = time.perf_counter() - started
        tally.cases += 1
        tally.slowest_seconds = max(tally.slowest_seconds, seconds)
        growth, peak = _peak_bytes() - peak, _peak_bytes()
        tally.growth_bytes += growth
        tally.last_refusal = message or tally.last_refusal
        if found not in ("accepted", "refused"):
            tally.failures.append(Failure(parser.name, seed, number, found, changed))
        elif growth > MAX_GROWTH_BYTES:
            what = f"peak memory grew by {growth / 2**20:.0f} MB"
            tally.failures.append(Failure(parser.name, seed, number, what, changed))
        else:
            tally.accepted += found == "accepted"
            tally.refused += found == "refused"
        if len(tally.failures) >= MAX_FAILURES:
            break
        _restore(place, valid, changed)
    tally.seconds = time.perf_counter() - began
    return tally


def changed_files(parser: FuzzedParser, valid: dict[str, bytes], seed: int, number: int) -> dict[str, bytes]:
    """The files of a case that differ from the valid ones."""
    return dict(parser.mutate(random.Random(f"{parser.name} {seed} {number}"), valid))


def _outcome(parser: FuzzedParser, place: Path, watch: WatchedWrites) -> tuple[str, str]:
    """`accepted`, `refused`, or what is wrong with the way in which a case ended; and the message of a refusal."""
    text = ""
    try:
        with watch.only_below(place), _limited():
            parser.read(place)
        found = "accepted"
    except (InputProblems, DamagedDataError) as error:
        text = str(error)
        found = "refused"
        if not text or len(text) > MAX_MESSAGE_CHARACTERS or escaped(text, meant="\n") != text:
            found = f"a message that cannot be shown: {text[:300]!r}"
    except SlowCase:
        return f"it took more than {SLOW_SECONDS:.0f} s", ""
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        way = " > ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
        return f"{type(error).__name__}: {str(error)[:300]!r} at {way}", ""
    if watch.taken:
        found = f"written elsewhere: {', '.join(watch.taken)}"
    return found, text if found == "refused" else ""


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Interrupt what takes too long; what a library in C does is interrupted when it returns."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise SlowCase

    earlier = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, SLOW_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)


def _restore(place: Path, valid: dict[str, bytes], changed: dict[str, bytes]) -> None:
    for name in changed:
        if name not in valid:
            (place / name).unlink()
    write_files(place, {name: valid[name] for name in changed if name in valid})


def _peak_bytes() -> int:
    """The most memory that this program has held: `ru_maxrss` may be that of the process that started it."""
    if not _STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIBIBYTE
    mark = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(mark.split()[1]) * _KIBIBYTE
