"""Packing: an epoch is one long line of tokens, cut into rows of equal length.

The line is the concatenation of the documents in the epoch's order, each with its end-of-document token. Row
j is tokens [j * P, (j + 1) * P) of the line, so every token stands in exactly one row, whoever asks for it
and whenever.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Span:
    """Tokens [start, stop) of the document at one position of an epoch's order."""

    position: int
    start: int
    stop: int


def document_ends(lengths: np.ndarray) -> np.ndarray:
    """Where each document ends on the line of tokens.

    Args:
        lengths: integers [documents], tokens of each document in the epoch's order, each at least 1.

    Returns:
        int64 [documents], exclusive ends; the last one is the number of tokens.
    """
    return np.cumsum(lengths, dtype=np.int64)


def row_spans(ends: np.ndarray, row: int, sequence_length: int) -> list[Span]:
    """The pieces of documents that make up one row.

    Args:
        ends: int64 [documents] from `document_ends`.
        row: which piece of the line, from 0.
        sequence_length: tokens in a row, P.

    Returns:
        Spans in order; their lengths sum to P.

    Raises:
        IndexError: the epoch has fewer rows.
    """
    begin = row * sequence_length
    end = begin + sequence_length
    if row < 0 or end > ends[-1]:
        raise IndexError(f"row {row} of {int(ends[-1]) // sequence_length}")
    spans = []
    position = int(np.searchsorted(ends, begin, side="right"))
    while begin < end:
        document_begin = int(ends[position - 1]) if position else 0
        stop = min(end, int(ends[position]))
        spans.append(Span(position, begin - document_begin, stop - document_begin))
        begin = stop
        position += 1
    return spans
