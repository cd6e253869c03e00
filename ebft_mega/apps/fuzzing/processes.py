"""Spread the cases of a search over processes, of which each writes to a directory of its own."""

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

from ebft_mega.apps.fuzzing.campaign import CURRENT_NAME, Tally, run_cases
from ebft_mega.apps.fuzzing.fuzzed_parsers import PARSERS, FuzzedParser
from ebft_mega.apps.fuzzing.watched_writes import WatchedWrites
from ebft_mega.errors import EbftError

_IN_MEMORY, _PREFIX = "/dev/shm", "ebft-fuzz-"
_watch: WatchedWrites | None = None


def run_campaign(parsers: Sequence[FuzzedParser], seed: int, numbers: range, processes: int = 1) -> Iterator[Tally]:
    """Run the same numbers of cases of several parsers.

    Args:
        processes: that work at a time; each takes every so manieth case. The cases do not depend on it.
    Yields:
        What became of each parser's, as soon as it is known.
    """
    if processes == 1:
        yield from (_run_share(parser.name, seed, numbers) for parser in parsers)
        return
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        shares = [
            [pool.submit(_run_share, parser.name, seed, numbers[first::processes]) for first in range(processes)]
            for parser in parsers
        ]
        try:
            for of_parser in shares:
                yield _joined([share.result() for share in of_parser])
        except BrokenProcessPool:
            raise EbftError(_last_words()) from None


def _last_words() -> str:
    """Say what a process was at that a library has crashed: its directory is still there."""
    left = sorted(Path(_memory() or tempfile.gettempdir()).glob(f"{_PREFIX}*/{CURRENT_NAME}"))
    found = [f"{path}: {path.read_text().strip()}" for path in left]
    return f"a process has crashed; the last cases (parser, seed, number): {'; '.join(found)}"


def _memory() -> str | None:
    """A place in memory where there is one: a case takes less time than a disk needs to open its file."""
    return _IN_MEMORY if os.access(_IN_MEMORY, os.W_OK) else None


def _run_share(name: str, seed: int, numbers: range) -> Tally:
    global _watch
    sys.dont_write_bytecode = True  # an import within a case would write
    _watch = _watch or WatchedWrites()
    parser = next(parser for parser in PARSERS if parser.name == name)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=_memory()) as scratch:
        return run_cases(parser, seed, numbers, Path(scratch), _watch)


def _joined(tallies: Sequence[Tally]) -> Tally:
    whole = Tally(tallies[0].parser)
    for tally in tallies:
        whole.add(tally)
    return whole
