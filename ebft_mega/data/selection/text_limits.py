"""Limits on a text: its size, the length of its lines and its share of letters and digits."""

import io
import string
from dataclasses import dataclass

from ebft_mega.data.text.text_files import TextDocument

# Why a document is left out: keys of the counts of `build.json`.
SHORT_DOCUMENTS = "documents under --min-document-bytes"
LONG_LINES = "documents with a line over --max-line-length"
LONG_MEAN_LINES = "documents over --max-mean-line-length"
FEW_ALPHANUMERICS = "documents under --min-alphanumeric"

_OTHER_ASCII = bytes(sorted(set(range(128)) - set((string.ascii_letters + string.digits).encode())))
_ALL_ASCII = dict.fromkeys(range(128))


@dataclass(frozen=True)
class TextLimits:
    """Which texts stay; None is no limit."""

    min_document_bytes: int | None = None  # of the text as UTF-8
    max_line_length: int | None = None  # characters of the longest line, its end left aside
    max_mean_line_length: float | None = None  # characters of all lines by their number
    min_alphanumeric: float | None = None  # share of letters and digits, of any script, among all characters

    def given(self) -> dict[str, str]:
        """The options that are limits, each with the reason by which it is counted."""
        reasons = {
            "min_document_bytes": SHORT_DOCUMENTS,
            "max_line_length": LONG_LINES,
            "max_mean_line_length": LONG_MEAN_LINES,
            "min_alphanumeric": FEW_ALPHANUMERICS,
        }
        return {
            f"--{name.replace('_', '-')}": reason for name, reason in reasons.items() if getattr(self, name) is not None
        }


def reason_to_leave_out(document: TextDocument, limits: TextLimits) -> str | None:
    """Why a document is not part of a dataset: the first limit that it breaks; None if it stays.

    Args:
        document: with a text that is not empty.
        limits: in the order in which they are tried.
    """
    text = document.text
    if limits.min_document_bytes is not None and document.num_bytes < limits.min_document_bytes:
        return SHORT_DOCUMENTS
    if limits.max_line_length is not None or limits.max_mean_line_length is not None:
        longest, mean = line_lengths(text)
        if limits.max_line_length is not None and longest > limits.max_line_length:
            return LONG_LINES
        if limits.max_mean_line_length is not None and mean > limits.max_mean_line_length:
            return LONG_MEAN_LINES
    if limits.min_alphanumeric is not None and alphanumeric_share(text) < limits.min_alphanumeric:
        return FEW_ALPHANUMERICS
    return None


def line_lengths(text: str) -> tuple[int, float]:
    r"""Characters of the longest line, and of a line in the mean; "\n", "\r\n" and "\r" end lines and count nowhere.

    Memory: up to 4 bytes a character.
    """
    longest = total = number = 0
    for line in io.StringIO(text, newline=None):
        length = len(line) - line.endswith("\n")
        longest = max(longest, length)
        total += length
        number += 1
    return longest, total / number if number else 0.0


def alphanumeric_share(text: str) -> float:
    """Share of letters and digits of any script among the characters of a text; 0 of an empty one."""
    count = len(text.encode("ascii", "ignore").translate(None, _OTHER_ASCII))
    if not text.isascii():
        count += sum(map(str.isalnum, text.translate(_ALL_ASCII)))
    return count / len(text) if text else 0.0
