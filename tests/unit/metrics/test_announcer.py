"""A phase is announced, then a line says every five seconds how far it has come, whatever else happens."""

import itertools
import threading

import pytest

from ebft_mega.io.progress_bar import BYTES
from ebft_mega.metrics import announcer as module
from ebft_mega.metrics.announcer import SILENT, Announcer, Report, counted

# A line is waited for at most this long: tests wait for what threads say.
PATIENCE_SECONDS = 10.0


class Lines(list):
    """What was said; can be waited for."""

    def __init__(self):
        super().__init__()
        self._arrived = threading.Condition()

    def say(self, text):
        with self._arrived:
            self.append(text)
            self._arrived.notify_all()

    def wait_for(self, count):
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self) >= count, PATIENCE_SECONDS), list(self)


def test_a_line_is_due_five_seconds_after_the_last_word():
    report = Report("start: reading", 8, "files", now=100.0)
    assert report.seconds_until_due(100.0) == 5.0 and report.due(104.9) is None
    report.add(2)
    assert report.due(105.0) == "start: reading: 2/8 files (25 %) in 5.0 s, 0.4/s"
    assert report.due(109.9) is None and report.seconds_until_due(109.0) == 1.0
    assert report.due(113.0) == "start: reading: 2/8 files (25 %) in 13.0 s, 0.154/s", "also where nothing moves"
    report.heard(117.0)
    assert report.due(121.9) is None and report.due(122.0) is not None
    report.add(6)
    assert report.end(125.0) == "start: reading: 8/8 files (100 %) in 25.0 s, 0.32/s: done"


def test_no_more_than_five_seconds_are_silent_whatever_is_counted():
    """Every tenth of a second somebody looks; between two lines there are five seconds."""
    report, said = Report("start: hashing", None, BYTES, now=0.0), []
    for tenth in range(1, 601):
        report.add(10**8)
        if report.due(tenth / 10) is not None:
            said.append(tenth / 10)
    assert said == [5.0 * number for number in range(1, 13)]


def test_what_cannot_be_counted_says_how_long_it_has_taken():
    report = Report("start: connecting 8 processes", None, "", now=0.0)
    assert report.due(5.0) == "start: connecting 8 processes: 5.0 s"
    assert Report("start: quick", None, "", now=0.0).end(4.0) is None, "a short phase has one line"


def test_a_short_phase_is_one_line_before_its_work():
    said = []
    announcer = Announcer(said.append)
    with announcer.phase("reading 3 files", 3, "files") as count:
        assert said == ["start: reading 3 files"]
        count(3)
    with announcer.of_part("step 4").phase("saving", is_announced=False):
        pass
    with announcer.of_part("end").phase("drawing"):
        pass
    assert said == ["start: reading 3 files", "end: drawing"]


def test_a_phase_that_lasts_is_reported_by_a_thread_of_its_own():
    """The main thread says nothing while it waits, as in a call into a library."""
    times, lines = itertools.count(100.0, 5.0), Lines()  # five seconds pass whenever somebody looks at the clock
    with Announcer(lines.say, clock=lambda: next(times)).phase("calling a library"):
        lines.wait_for(4)
    assert lines[0] == "start: calling a library"
    assert all(line.startswith("start: calling a library: ") and line.endswith(" s") for line in lines[1:4])
    assert lines[-1].endswith(": done")


def test_the_innermost_phase_reports(monkeypatch):
    monkeypatch.setattr(module, "LINE_INTERVAL_SECONDS", 0.05)
    lines = Lines()
    announcer = Announcer(lines.say)
    with announcer.phase("outer"):
        with announcer.phase("inner", 4, "tensors") as count:
            count(1)
            lines.wait_for(5)
            inner = list(lines)
        lines.wait_for(len(inner) + 3)
    assert inner[:2] == ["start: outer", "start: inner"]
    assert all(line.startswith("start: inner: 1/4 tensors (25 %) in ") for line in inner[2:])
    after = lines[len(inner) + 1 :]  # the end of the inner one may come in between
    assert after and all(line.startswith("start: outer: ") for line in after if "inner" not in line)


def test_work_that_fails_ends_its_reports(monkeypatch):
    monkeypatch.setattr(module, "LINE_INTERVAL_SECONDS", 0.02)
    lines = Lines()
    announcer = Announcer(lines.say)
    before = threading.active_count()
    with pytest.raises(OSError), announcer.phase("reading"):
        lines.wait_for(2)
        raise OSError
    assert threading.active_count() == before and not lines[-1].endswith("done")
    said = len(lines)
    with announcer.phase("the next one", is_announced=False):
        lines.wait_for(said + 1)
    assert lines[said].startswith("start: the next one")


def test_a_rank_that_does_not_speak_is_silent(capsys):
    before = threading.active_count()
    with SILENT.phase("reading", 3, "files") as count:
        assert threading.active_count() == before
        count(1)
    SILENT.note("a line")
    with Announcer.of_start(speaks=False).phase("reading"):
        pass
    assert capsys.readouterr() == ("", "")
    with Announcer.of_start(speaks=True).phase("reading\x1b"):
        assert capsys.readouterr().out == "start: reading\\u001b\n"


def test_items_are_counted_when_they_are_done():
    done = []
    items = counted("ab", done.append)
    next(items)
    assert done == []
    assert list(items) == ["b"] and done == [1, 1]


def test_a_count_on_a_terminal_is_a_bar(monkeypatch):
    made = []

    class Bar:
        def __init__(self, total, title, unit):
            made.append((total, title, unit))

        def __enter__(self):
            return self

        def __exit__(self, *error):
            made.append("end")

        def add(self, amount):
            made.append(amount)

    monkeypatch.setattr(module, "Meter", Bar)
    said = []
    with Announcer(said.append, draws_bars=True).phase("reading", 3, "files") as count:
        count(2)
    assert said == ["start: reading"] and made == [(3, "start: reading", "files"), 2, "end"]
