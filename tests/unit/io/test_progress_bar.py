"""Progress on a terminal and in a log file."""

import ast
import io
import sys
from pathlib import Path

import pytest

from ebft_mega.io import progress_bar
from ebft_mega.io.progress_bar import BYTES, LongCount, Meter, progress_words, track

PACKAGE = Path(progress_bar.__file__).resolve().parents[1]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_lines_go_to_the_error_stream(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(iter("abc"), 3, "reading")) == ["a", "b", "c"]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("reading: 3/3 (100 %)")


def test_a_line_every_few_seconds(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with Meter(None, "reading") as meter:
        for done in range(1, 31):
            now += 1
            meter.show(done)
    assert capsys.readouterr().err.splitlines() == [
        *(f"reading: {done} in {done}.0 s, 1/s" for done in range(5, 31, 5)),
        "reading: 30 in 30.0 s, 1/s",
    ]


def test_a_count_that_takes_long_is_said_and_another_one_is_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    count = LongCount("names in \x1b")
    for _ in range(12):
        now += 1
        count.add(2)
    lines = ["names in \\u001b: 10 in 5.0 s, 2/s", "names in \\u001b: 20 in 10.0 s, 2/s"]
    assert capsys.readouterr().err.splitlines() == lines
    LongCount("names").add()
    assert capsys.readouterr().err == ""


def test_how_far_work_has_come_in_words() -> None:
    assert progress_words(3, 12, 5.0, "tensors") == "3/12 tensors (25 %) in 5.0 s, 0.6/s"
    assert progress_words(3, None, 0.0) == "3 in 0.0 s, 0/s"
    assert progress_words(24_690, None, 2.0) == "24690 in 2.0 s, 12,345/s"
    assert progress_words(1_500_000_000, 6_000_000_000, 5.0, BYTES) == "1.500/6.000 GB (25 %) in 5.0 s, 0.300 GB/s"
    assert progress_words(1_500_000_000, None, 5.0, BYTES) == "1.500 GB in 5.0 s, 0.300 GB/s"


def test_work_that_fails_or_is_given_up_has_no_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OSError), Meter(3, "reading"):
        raise OSError
    items = track("abc", 3, "reading")
    next(items)
    items.close()  # type: ignore[attr-defined]
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(track("abcd", 4, "reading")) == list("abcd")
    assert "reading" in terminal.getvalue()
    assert "100%" in terminal.getvalue()
    assert "reading: 4/4" not in terminal.getvalue()


def test_one_module_knows_rich() -> None:
    modules = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(name and name.split(".")[0] == "rich" for name in names):
                modules.add(path.relative_to(PACKAGE).as_posix())
    assert modules == {"io/progress_bar.py"}
