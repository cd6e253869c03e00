"""Progress of long work: a bar on a terminal, by the rich package, or a line now and then in a log file."""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from ebft_mega.io.standard_streams import drawing_stream, print_line
from ebft_mega.shown_text import LONGEST_NOTE, escaped, shown

if TYPE_CHECKING:
    from rich.progress import Progress

Item = TypeVar("Item")
LINE_INTERVAL_SECONDS = 5.0
BYTES = "GB"  # the unit of what is counted in bytes
_BYTES_PER_UNIT = 1e9


def progress_words(done: int, total: int | None, seconds: float, unit: str = "") -> str:
    """Say how far work has come: `3/12 tensors (25 %) in 5.0 s, 0.6/s`.

    Args:
        done: how much is done.
        total: where the count ends, None where it is not known.
        seconds: since the work began.
        unit: what is counted; `BYTES` for a count of bytes, which is shown in GB (1e9 bytes).
    """
    rate = done / seconds if seconds > 0 else 0.0
    if unit == BYTES:
        whole = f"/{total / _BYTES_PER_UNIT:.3f}" if total else ""
        amount, pace = f"{done / _BYTES_PER_UNIT:.3f}{whole} GB", f"{rate / _BYTES_PER_UNIT:.3f} GB/s"
    else:
        amount, pace = f"{done}{f'/{total}' if total else ''}{f' {unit}' if unit else ''}", f"{_few_digits(rate)}/s"
    share = f" ({100 * done / total:.0f} %)" if total else ""
    return f"{amount}{share} in {seconds:.1f} s, {pace}"


def track(items: Iterable[Item], total: int | None, description: str) -> Iterator[Item]:
    """Yield the items while showing on standard error how many are done.

    Args:
        items: what is worked on.
        total: number of items, None where it is not known.
        description: a few words for the line.
    """
    with Meter(total, description) as meter:
        for done, item in enumerate(items, 1):
            yield item
            meter.show(done)


def _few_digits(rate: float) -> str:
    """`1,234`, `56.7` or `0.0123`."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


class Meter:
    """Show on standard error how much is done, where others count it; used as a context manager.

    Args:
        total: where the count ends, None where it is not known.
        description: a few words for the line.
        unit: what is counted; `BYTES` for a count of bytes.
    """

    def __init__(self, total: int | None, description: str, unit: str = ""):
        self._total, self._unit = total, unit
        self._description = shown(description)
        self._done = 0
        self._started = self._last_line = time.monotonic()
        self._bar = work_bar(total, description) if sys.stderr.isatty() else None

    def __enter__(self) -> "Meter":
        if self._bar is not None:
            self._bar.start()
        return self

    def show(self, done: int) -> None:
        """Show the count of what is done so far."""
        self._done = done
        if self._bar is not None:
            self._bar.show(done)
            return
        now = time.monotonic()
        if now - self._last_line >= LINE_INTERVAL_SECONDS:
            self._last_line = now
            self._print_line(now)

    def add(self, amount: int) -> None:
        """Count on."""
        self.show(self._done + amount)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._print_line(time.monotonic())

    def _print_line(self, now: float) -> None:
        words = progress_words(self._done, self._total, now - self._started, self._unit)
        print_line(f"{self._description}: {words}")


class LongCount:
    """Say on standard error how far a count has come, where it takes longer than a line's interval; else nothing.

    Args:
        description: a few words for the line.
    """

    def __init__(self, description: str):
        self._description = shown(description)
        self._done = 0
        self._started = self._last_line = time.monotonic()

    def add(self, count: int = 1) -> None:
        """Count on."""
        self._done += count
        now = time.monotonic()
        if now - self._last_line >= LINE_INTERVAL_SECONDS:
            self._last_line = now
            words = progress_words(self._done, None, now - self._started)
            print_line(f"{self._description}: {words}")


class _AboveBar:
    """What is printed while a bar is drawn: the package takes it past the standard stream, colours and all."""

    def __init__(self, proxy: TextIO):
        self._proxy = proxy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._proxy, name)

    def write(self, text: str) -> int:
        """Print a text, with escapes for what a terminal would obey."""
        self._proxy.write(escaped(text, "\n\t"))
        return len(text)


class TerminalBar:
    """One bar, redrawn in place from `start` to `stop`.

    Args:
        progress: rich's display, with its columns.
        description: for the columns.
        total: where the count ends, None where it is not known.
        done: where the count begins.
        texts: other texts for the columns, by name.
    """

    def __init__(self, progress: "Progress", description: str, total: int | None, done: int = 0, **texts: str):
        self._progress = progress
        self._task = progress.add_task(shown(description), total=total, completed=done, **_as_shown(texts))

    def start(self) -> None:
        """Draw the bar and keep it up to date; what is printed meanwhile appears above it."""
        self._progress.start()
        for name in ("stdout", "stderr"):
            proxy = getattr(sys, name)
            if hasattr(proxy, "rich_proxied_file"):  # the bar's own; it is taken back when the bar ends
                setattr(sys, name, _AboveBar(proxy))

    def show(self, done: int, **texts: str) -> None:
        """Show the count of what is done so far, and the texts of the columns."""
        self._progress.update(self._task, completed=done, **_as_shown(texts))

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(shown(text, LONGEST_NOTE), markup=False, emoji=False, highlight=False)

    def stop(self) -> None:
        """Stop redrawing; the last state of the bar stays on screen."""
        self._progress.stop()


def work_bar(total: int | None, description: str) -> TerminalBar:
    """A bar with a description, the share that is done and the time left, on standard error."""
    # Imported here because a log file does without it.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    progress = Progress(
        TextColumn("{task.description}", style="progress.description", markup=False),
        BarColumn(),
        TaskProgressColumn(show_speed=True),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(file=drawing_stream(sys.stderr)),
    )
    return TerminalBar(progress, description, total)


def step_bar(total_steps: int, first_step: int, stream: TextIO) -> TerminalBar:
    """A bar over the steps of a run, with the texts `clock` and `numbers` beside it.

    Args:
        total_steps: steps of the whole run.
        first_step: steps that were done before this start.
        stream: the terminal.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Column

    progress = Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=12),
        TimeElapsedColumn(),
        TextColumn("{task.fields[clock]}", markup=False),
        # On a narrow terminal the numbers are cut, never the bar or the time left.
        TextColumn("{task.fields[numbers]}", markup=False, table_column=Column(no_wrap=True, ratio=1)),
        expand=True,
        console=Console(file=drawing_stream(stream)),
    )
    return TerminalBar(progress, "train", total_steps, first_step, clock="", numbers="")


def _as_shown(texts: Mapping[str, str]) -> dict[str, Any]:
    return {name: shown(text) for name, text in texts.items()}
