"""Progress of long work: a bar on a terminal, a line now and then in a log file. Always on standard error."""

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

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


class Meter:
    """Shows a count that other processes may raise; used as a context manager.

    Args:
        total: where the count ends, None where it is not known.
        description: a few words for the line.
    """

    def __init__(self, total: int | None, description: str):
        self._total = total
        self._description = description
        self._done = 0
        self._started = self._last_line = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True))
            self._task = self._bar.add_task(description, total=total)

    def __enter__(self) -> "Meter":
        if self._bar is not None:
            self._bar.start()
        return self

    def show(self, done: int) -> None:
        """Takes the count of what is done so far."""
        self._done = done
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
            return
        now = time.monotonic()
        if now - self._last_line >= LINE_INTERVAL_SECONDS:
            self._last_line = now
            _print_line(self._description, done, self._total, now - self._started)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            _print_line(self._description, self._done, self._total, time.monotonic() - self._started)
