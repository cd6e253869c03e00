"""Concatenate a source's documents, epoch after epoch, and cut rows of equal length.

The line is epoch after epoch, each of them all documents in the epoch's order, each document followed by its
end-of-document token. Epoch e begins at coordinate e * T, where T is the number of tokens of an epoch. Chunk j of
the line is tokens [j * P, (j + 1) * P). It may extend over the end of an epoch, so the tokens that fill no whole row
at the end of one epoch are the beginning of the next epoch's first row, and every token of every epoch is in exactly
one row.

Rows are not read in the order of the line: a long document fills many neighbouring chunks, which would share a
batch. The chunks that begin in one window of an epoch (see `order`) are permuted among themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ebft_mega.data.rows.order import EpochWindows, FeistelPermutation, epoch_windows, permutation
from ebft_mega.data.store.format import WINDOW_DOCUMENTS

MAX_WINDOWS = 4  # cached of a source: the current one, the one that its last row extends into, and some before


@dataclass(frozen=True)
class Span:
    """Tokens [start, stop) of a document as it stands in one epoch; its end-of-document token is its last."""

    epoch: int
    document: int
    start: int
    stop: int


@dataclass(frozen=True)
class Window:
    """A stretch of the line whose documents are shuffled together.

    Memory: 16 bytes a document, and about 40 while it is made: 2 to 4 MB for the windows of `WINDOW_DOCUMENTS` that
    `epoch_windows` makes of shards of the usual sizes.
    """

    epoch: int
    number: int  # in its epoch
    begin: int  # coordinate of its first token
    end: int  # coordinate after its last token
    documents: np.ndarray  # int64 [documents], in the order of the line
    ends: np.ndarray  # int64 [documents], where each of them ends, counted from `begin`
    first_row: int  # the first row that begins in the window or after it
    rows: FeistelPermutation | None  # of the rows that begin in the window; None: in order, or there are none


def document_ends(lengths: np.ndarray) -> np.ndarray:
    """Where each document ends on a line of tokens.

    Args:
        lengths: integers [documents], tokens of each document in order, each at least 1.

    Returns:
        int64 [documents], exclusive ends; the last one is the number of tokens.
    """
    return np.cumsum(lengths, dtype=np.int64)


def document_ranges(ends: np.ndarray, begin: int, end: int) -> list[tuple[int, int, int]]:
    """The token ranges of documents that make up a stretch of a line.

    Args:
        ends: int64 [documents] from `document_ends`.
        begin, end: the stretch, 0 <= begin <= end <= ends[-1].

    Returns:
        (position of the document in `ends`, first token, token after the last) in order; together they are end - begin
        tokens.
    """
    found = []
    position = int(np.searchsorted(ends, begin, side="right"))
    document_begin = int(ends[position - 1]) if position else 0
    while begin < end:
        document_end = int(ends[position])
        stop = min(end, document_end)
        found.append((position, begin - document_begin, stop - document_begin))
        begin, document_begin = stop, document_end
        position += 1
    return found


class PackedLine:
    """The endless rows of one source, numbered in the order in which they are read.

    Finding a row costs the same anywhere: the windows around it are computed from their numbers. At most
    `MAX_WINDOWS` windows are cached.

    Args:
        shard_documents, shard_tokens: integers [shards], documents and tokens of each shard in the manifest's order.
        lengths: integers [documents], tokens of each document; the documents of a shard are neighbours.
        fingerprint: the dataset's fingerprint.
        sequence_length: tokens in a row, P.
        seed: seed of the order; None keeps shards, documents and rows in the dataset's order.
        window_documents: documents that close a window.
    """

    def __init__(
        self,
        shard_documents: Sequence[int] | np.ndarray,
        shard_tokens: Sequence[int] | np.ndarray,
        lengths: np.ndarray,
        fingerprint: str,
        sequence_length: int,
        seed: int | None,
        window_documents: int = WINDOW_DOCUMENTS,
    ):
        self._shard_documents = np.asarray(shard_documents, np.int64)
        self._shard_tokens = np.asarray(shard_tokens, np.int64)
        self._first_documents = np.cumsum(self._shard_documents) - self._shard_documents
        self._lengths = lengths
        self._fingerprint = fingerprint
        self._sequence_length = sequence_length
        self._seed = seed
        self._window_documents = window_documents
        self.tokens_per_epoch = int(self._shard_tokens.sum())
        # Replaced, never changed: threads may share a line without a lock, which a fork could leave locked.
        self._epochs: dict[int, tuple[EpochWindows, np.ndarray]] = {}
        self._windows: dict[tuple[int, int], Window] = {}

    def window_of_row(self, row: int) -> Window:
        """The window that a row begins in."""
        return self._window_at(row * self._sequence_length)

    def chunk_of_row(self, row: int) -> int:
        """Which chunk of the line a row is; both are counted from 0."""
        window = self.window_of_row(row)
        return row if window.rows is None else window.first_row + window.rows.item_at(row - window.first_row)

    def spans_of_row(self, row: int) -> list[Span]:
        """The token ranges of documents that make up a row, P tokens together.

        Args:
            row: number of the row in reading order, from 0.
        """
        begin = self.chunk_of_row(row) * self._sequence_length
        end = begin + self._sequence_length
        spans = []
        while begin < end:
            window = self._window_at(begin)
            stop = min(end, window.end)
            for position, first, last in document_ranges(window.ends, begin - window.begin, stop - window.begin):
                spans.append(Span(window.epoch, int(window.documents[position]), first, last))
            begin = stop
        return spans

    def shards_from(self, window: Window) -> list[int]:
        """Shards that are read from the beginning of a window to the end of the next one, in order."""
        windows = self._epoch(window.epoch)[0]
        if window.number + 1 < len(windows):
            following = windows.shards_of(window.number + 1)
        else:
            following = self._epoch(window.epoch + 1)[0].shards_of(0)
        return list(dict.fromkeys([*windows.shards_of(window.number).tolist(), *following.tolist()]))

    def _epoch(self, epoch: int) -> tuple[EpochWindows, np.ndarray]:
        """Windows of an epoch and the tokens before each of them, int64 [windows + 1]."""
        found = self._epochs.get(epoch)
        if found is None:
            key = (self._seed, epoch, self._fingerprint)
            windows = epoch_windows(self._shard_documents, *key, self._window_documents)
            tokens_before = np.concatenate(([0], np.cumsum(self._shard_tokens[windows.shards])))
            found = windows, tokens_before[windows.first]
            neighbours = {other: value for other, value in self._epochs.items() if abs(other - epoch) == 1}
            self._epochs = {**neighbours, epoch: found}
        return found

    def _window_at(self, coordinate: int) -> Window:
        for window in self._windows.values():
            if window.begin <= coordinate < window.end:
                return window
        epoch, inside = divmod(coordinate, self.tokens_per_epoch)
        number = int(np.searchsorted(self._epoch(epoch)[1], inside, side="right")) - 1
        window = self._build_window(epoch, number)
        newest = list(self._windows.items())[-(MAX_WINDOWS - 1) :]
        self._windows = {**dict(newest), (epoch, number): window}
        return window

    def _build_window(self, epoch: int, number: int) -> Window:
        windows, tokens_before = self._epoch(epoch)
        begin = epoch * self.tokens_per_epoch + int(tokens_before[number])
        end = epoch * self.tokens_per_epoch + int(tokens_before[number + 1])
        shards = windows.shards_of(number)
        counts = self._shard_documents[shards]
        # A document's number is that of the first document of its shard plus its place in the shard.
        documents = np.arange(counts.sum()) + np.repeat(
            self._first_documents[shards] - np.cumsum(counts) + counts, counts
        )
        rows = None
        first_row = -(-begin // self._sequence_length)
        num_rows = -(-end // self._sequence_length) - first_row
        if self._seed is not None:
            key = (self._seed, epoch, number, self._fingerprint)
            documents = documents[permutation(len(documents), "documents", *key)]
            rows = FeistelPermutation(num_rows, "rows", *key) if num_rows else None
        return Window(epoch, number, begin, end, documents, document_ends(self._lengths[documents]), first_row, rows)
