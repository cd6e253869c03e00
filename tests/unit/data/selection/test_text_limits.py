"""Limits on texts, compared with counting letter by letter."""

import hashlib
import random

import pytest

from ebft_mega.data.selection.text_limits import (
    FEW_ALPHANUMERICS,
    LONG_LINES,
    LONG_MEAN_LINES,
    SHORT_DOCUMENTS,
    TextLimits,
    alphanumeric_share,
    line_lengths,
    reason_to_leave_out,
)
from ebft_mega.data.text.text_files import TextDocument


def document(text: str) -> TextDocument:
    return TextDocument(text, hashlib.sha256(text.encode()).digest(), "a.py")


@pytest.mark.parametrize(
    ("text", "limits", "reason"),
    [
        ("é", TextLimits(min_document_bytes=2), None),
        ("é", TextLimits(min_document_bytes=3), SHORT_DOCUMENTS),
        ("abc\nab\n", TextLimits(max_line_length=3), None),
        ("abc\nabcd\n", TextLimits(max_line_length=3), LONG_LINES),
        ("abcd", TextLimits(max_line_length=3), LONG_LINES),
        ("éééé\r\n", TextLimits(max_line_length=4), None),  # characters, and no line end
        ("abcd\n\n", TextLimits(max_mean_line_length=2), None),
        ("abcd\na\n", TextLimits(max_mean_line_length=2), LONG_MEAN_LINES),
        ("a---", TextLimits(min_alphanumeric=0.25), None),
        ("a----", TextLimits(min_alphanumeric=0.25), FEW_ALPHANUMERICS),
        ("é漢1_", TextLimits(min_alphanumeric=0.75), None),
        ("\n\n", TextLimits(min_alphanumeric=0.01), FEW_ALPHANUMERICS),
        ("a" * 9 + "-" * 91, TextLimits(200, 50, 50, 0.5), SHORT_DOCUMENTS),  # one reason, the first
        ("a" * 9 + "-" * 91, TextLimits(None, 50, 50, 0.5), LONG_LINES),
        ("-" * 100, TextLimits(), None),
    ],
)
def test_each_limit(text: str, limits: TextLimits, reason: str | None) -> None:
    assert reason_to_leave_out(document(text), limits) == reason


def test_figures_equal_those_of_each_letter() -> None:
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choices("aZ0é漢\u0663_-+ \t\x0b\u2028\n\n\r", k=draw.randint(1, 40)))
        lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        lines = lines[:-1] if lines[-1] == "" else lines
        assert line_lengths(text) == (max(map(len, lines)), sum(map(len, lines)) / len(lines))
        assert alphanumeric_share(text) == sum(letter.isalnum() for letter in text) / len(text)


def test_limits_that_are_given_name_their_options() -> None:
    assert TextLimits().given() == {}
    assert TextLimits(1, 2, 3, 0.5).given() == {
        "--min-document-bytes": SHORT_DOCUMENTS,
        "--max-line-length": LONG_LINES,
        "--max-mean-line-length": LONG_MEAN_LINES,
        "--min-alphanumeric": FEW_ALPHANUMERICS,
    }
