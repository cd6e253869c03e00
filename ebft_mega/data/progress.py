"""Progress of long work: a bar on a terminal, a line now and then in a log file. Always on standard error."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
LINE_INTERVAL_SECONDS = 10.0


def track(items: Iterable[Item], total: int | None, description: str) -> Iterator[Item]:
    """Yields the items while showing how far the work has come.

    Args:
        items: what is worked on.
        total: number of items, None where it is not known.
        description: a few words for the line.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track as rich_track

        console = Console(stderr=True)
        return iter(rich_track(items, description=description, total=total, console=console))
    return _track_plainly(items, total, description)


def _track_plainly(items: Iterable[Item], total: int | None, description: str) -> Iterator[Item]:
    started = last_line = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += 1
        now = time.monotonic()
        if now - last_line >= LINE_INTERVAL_SECONDS:
            last_line = now
            _print_line(description, done, total, now - started)
    _print_line(description, done, total, time.monotonic() - started)


def _print_line(description: str, done: int, total: int | None, elapsed_seconds: float) -> None:
    of_total = f"/{total} ({100 * done / total:.0f} %)" if total else ""
    print(f"{description}: {done}{of_total} in {elapsed_seconds:.1f} s", file=sys.stderr, flush=True)
