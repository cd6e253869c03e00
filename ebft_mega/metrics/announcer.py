"""Say what a run does before its first step and after its last one: each phase before it begins, then while it lasts.

A phase that lasts says every five seconds how far it has come, whatever the main thread does meanwhile: a thread of the
phase says it, so that a single large file, or a call into a library, is no silence either. Imports no torch.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

from ebft_mega.io.progress_bar import LINE_INTERVAL_SECONDS, Meter, progress_words
from ebft_mega.io.standard_streams import print_line

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
# Told how much more is done, in the unit of the phase.
Count = Callable[[int], None]


def counted(items: Iterable[Item], count: Count) -> Iterator[Item]:
    """Yield the items, and count each of them when the next one is asked for."""
    for item in items:
        yield item
        count(1)


def _uncounted(amount: int) -> None:
    """Count nothing: nobody watches."""


class Report:
    """What is said of one phase, and when: a line once five seconds have gone since the last word.

    Args:
        words: what the phase is, as it was announced.
        total: where its count ends; None: it is not known.
        unit: what is counted; empty: nothing.
        now: time of the announcement, in seconds; all times are of one clock.
    """

    def __init__(self, words: str, total: int | None, unit: str, now: float):
        self._words, self._total, self._unit = words, total, unit
        self._began = self._last_word = now
        self._done = 0
        self._is_long = False

    def add(self, amount: int) -> None:
        """Count on; says nothing by itself."""
        self._done += amount

    def heard(self, now: float) -> None:
        """Take in that something else was said meanwhile."""
        self._last_word = now

    def seconds_until_due(self, now: float) -> float:
        """Time until the next line is due, 0 if it is."""
        return max(0.0, self._last_word + LINE_INTERVAL_SECONDS - now)

    def due(self, now: float) -> str | None:
        """The line that is due, if one is."""
        if self.seconds_until_due(now) > 0:
            return None
        self._last_word, self._is_long = now, True
        return self._line(now)

    def end(self, now: float) -> str | None:
        """The last line of a phase of which it was said that it lasts."""
        return f"{self._line(now)}: done" if self._is_long else None

    def _line(self, now: float) -> str:
        seconds = now - self._began
        if not self._unit:
            return f"{self._words}: {seconds:.1f} s"
        return f"{self._words}: {progress_words(self._done, self._total, seconds, self._unit)}"


@dataclass(frozen=True)
class Announcer:
    """Announces the phases of a start or an end, on the rank that speaks.

    Phases may lie within each other: the inner one reports.
    """

    say: Callable[[str], None] | None = None  # prints a line; None: this rank is silent
    part: str = "start"  # what of the run the phases are of
    draws_bars: bool = False  # whether counts are bars, for a terminal on which nothing else is drawn
    clock: Callable[[], float] = time.monotonic
    _reports: list[Report] = field(default_factory=list, compare=False)  # of the phases under way, the innermost last

    @classmethod
    def of_start(cls, speaks: bool) -> "Announcer":
        """The announcer of a process that starts, on standard output.

        Args:
            speaks: whether this process speaks for the job.
        """
        if not speaks:
            return cls()
        return cls(_print, draws_bars=sys.stdout.isatty() and sys.stderr.isatty())

    def of_part(self, part: str) -> "Announcer":
        """The same for another part of the run, such as `end`."""
        return replace(self, part=part)

    def note(self, text: str) -> None:
        """Say a line of its own."""
        if self.say is not None:
            self.say(text)

    @contextmanager
    def phase(
        self, words: str, total: int | None = None, unit: str = "", *, is_announced: bool = True
    ) -> Iterator[Count]:
        """Announce a phase, and say every five seconds how far it has come until the context ends.

        Args:
            words: what it is and roughly how large.
            total: where its count ends; None: it is not known.
            unit: what is counted (`progress_bar.BYTES`: bytes); empty: nothing, and only the time is said.
            is_announced: whether it has a line even if it is short.
        Returns:
            What to call with each amount that is done.
        Communication: none.
        """
        if self.say is None:
            yield _uncounted
            return
        title = f"{self.part}: {words}"
        if is_announced:
            self.say(title)
        if self.draws_bars and total:
            with Meter(total, title, unit) as meter:
                yield meter.add
            return
        report, ended = Report(title, total, unit, self.clock()), threading.Event()
        self._reports.append(report)
        reporter = threading.Thread(target=self._keep_reporting, args=(report, ended), name="announcer", daemon=True)
        reporter.start()
        try:
            yield report.add
        except BaseException:
            self._end(report, reporter, ended)
            raise
        self._end(report, reporter, ended)
        if (line := report.end(self.clock())) is not None:
            self.say(line)

    def _keep_reporting(self, report: Report, ended: threading.Event) -> None:
        """Say what is due until the phase has ended; runs in a thread."""
        while not ended.wait(report.seconds_until_due(self.clock())):
            if self._reports[-1:] != [report]:
                report.heard(self.clock())  # a phase within this one reports
            elif (line := report.due(self.clock())) is not None and self.say is not None:
                self.say(line)

    def _end(self, report: Report, reporter: threading.Thread, ended: threading.Event) -> None:
        ended.set()
        reporter.join(LINE_INTERVAL_SECONDS)
        self._reports.remove(report)
        for outer in self._reports:
            outer.heard(self.clock())


SILENT = Announcer()


def _print(text: str) -> None:
    logger.info("%s", text)
    print_line(text, sys.stdout)
