"""Random access to the packed rows of a dataset, numbered through all epochs. Imports no torch."""

from dataclasses import dataclass

import numpy as np

from ebft_mega.data.dataset import Dataset
from ebft_mega.data.inputs import bad_input
from ebft_mega.data.order import epoch_permutation
from ebft_mega.data.packing import document_ends, row_spans


@dataclass(frozen=True)
class Row:
    """One packed row of raw text."""

    tokens: np.ndarray  # int64 [P]
    document_ids: np.ndarray  # int64 [P], number of the document in the dataset; its end token carries it too


@dataclass(frozen=True)
class StreamState:
    """Where a run stands in its data: all that exact resumption needs, whatever the number of ranks."""

    seed: int | None
    next_row: int  # first row that no committed step has used
    fingerprint: str
    sequence_length: int


@dataclass(frozen=True)
class _EpochOrder:
    epoch: int
    documents: np.ndarray  # int64 [documents], document number at each position of the line of tokens
    ends: np.ndarray  # int64 [documents], where each of them ends on that line
    rows: np.ndarray | None  # int64 [rows_per_epoch], the piece of the line that each row is; None: in order


class RowStream:
    """The packed rows of a dataset in the order of a seed; any row can be read at any time.

    In each epoch the documents are permuted and packed, and then the rows are permuted too: a long document
    fills many neighbouring rows, and without the second permutation they would all fall into the same few
    batches.

    Args:
        dataset: an opened dataset.
        sequence_length: tokens in a row, P.
        seed: seed of the order; None keeps documents and rows in dataset order, the same in every epoch.

    Raises:
        InputError: the dataset has fewer tokens than one row.
    """

    def __init__(self, dataset: Dataset, sequence_length: int, seed: int | None):
        if sequence_length < 1:
            raise ValueError(f"sequence_length {sequence_length} is not positive")
        if dataset.manifest.tokens < sequence_length:
            where = str(dataset.directory)
            found = f"{dataset.manifest.tokens} tokens"
            expected = f"at least one row of data.sequence_length = {sequence_length} tokens"
            raise bad_input(where, "tokens", found, expected)
        self.dataset = dataset
        self.sequence_length = sequence_length
        self.seed = seed
        self._order: _EpochOrder | None = None
        self._last_document: tuple[int, np.ndarray] | None = None

    @property
    def rows_per_epoch(self) -> int:
        """Whole rows in one pass over the dataset."""
        return self.dataset.manifest.tokens // self.sequence_length

    @property
    def tail_tokens(self) -> int:
        """Tokens at the end of every epoch that fill no row; other documents stand there in every epoch."""
        return self.dataset.manifest.tokens % self.sequence_length

    def state(self, next_row: int) -> StreamState:
        """The state of a run that has used the rows before `next_row`."""
        return StreamState(self.seed, next_row, self.dataset.manifest.fingerprint, self.sequence_length)

    def row(self, number: int) -> Row:
        """Reads one row.

        Args:
            number: row number counted through all epochs from 0.

        Returns:
            The row, tokens and document ids int64 [P].

        Raises:
            DamagedDataError: a document of the row fails its check.
        """
        if number < 0:
            raise IndexError(f"row {number}")
        epoch, position = divmod(number, self.rows_per_epoch)
        order = self._epoch_order(epoch)
        row_on_line = position if order.rows is None else int(order.rows[position])
        tokens = np.empty(self.sequence_length, np.int64)
        document_ids = np.empty(self.sequence_length, np.int64)
        filled = 0
        for span in row_spans(order.ends, row_on_line, self.sequence_length):
            document = int(order.documents[span.position])
            stop = filled + span.stop - span.start
            tokens[filled:stop] = self._document(document)[span.start : span.stop]
            document_ids[filled:stop] = document
            filled = stop
        return Row(tokens, document_ids)

    def _epoch_order(self, epoch: int) -> _EpochOrder:
        order = self._order
        if order is None or order.epoch != epoch:
            manifest = self.dataset.manifest
            if self.seed is None:
                documents, rows = np.arange(manifest.documents), None
            else:
                key = (self.seed, epoch, manifest.fingerprint)
                documents = epoch_permutation(manifest.documents, "documents", *key)
                rows = epoch_permutation(self.rows_per_epoch, "rows", *key)
            order = _EpochOrder(epoch, documents, document_ends(self.dataset.index["tokens"][documents]), rows)
            self._order = order
        return order

    def _document(self, number: int) -> np.ndarray:
        # In dataset order neighbouring rows share a document, which is then read and checked once.
        last = self._last_document
        if last is None or last[0] != number:
            last = (number, self.dataset.read_document(number))
            self._last_document = last
        return last[1]
