"""Global batches of rows, this rank's slice of each, read ahead in the background."""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from ebft_mega.data.dataset import Dataset
from ebft_mega.data.inputs import bad_input
from ebft_mega.data.order import epoch_permutation
from ebft_mega.data.stream import RowStream, StreamState
from ebft_mega.errors import DamagedDataError
from ebft_mega.types import TokenBatch


@dataclass(frozen=True)
class SkippedRow:
    """A row that could not be read and became filler."""

    number: int  # of the row, counted through the whole run
    index: int  # of the row in the global batch of its step
    damage: DamagedDataError


@dataclass(frozen=True)
class LoadedBatch:
    """This rank's rows of one global batch."""

    rows: TokenBatch
    skipped: tuple[SkippedRow, ...] = ()  # these rows are filler in `rows` (row index -1)


class BatchLoader:
    """Endless batches of one data-parallel rank.

    Global batch b holds rows [b * global_batch_size, (b + 1) * global_batch_size) after the first one; a rank
    gets a contiguous slice. Tensor- and pipeline-parallel peers pass the same data-parallel rank and so read
    the same rows. The state moves when a step commits, never by reading ahead; every new iteration starts at
    the state.

    Args:
        stream: rows in training order.
        global_batch_size: rows of an optimizer step over all ranks.
        data_parallel_rank: this rank's place in its data-parallel group.
        data_parallel_size: ranks in that group; divides `global_batch_size`.
        next_row: first row to use, counted through all epochs.
        prefetch_batches: batches read ahead by a background thread; 0 reads in the caller. The order never
            depends on it.
    """

    def __init__(
        self,
        stream: RowStream,
        global_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        next_row: int = 0,
        prefetch_batches: int = 2,
    ):
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise ValueError(f"data-parallel rank {data_parallel_rank} of {data_parallel_size}")
        if global_batch_size < 1 or global_batch_size % data_parallel_size:
            raise ValueError(f"global batch size {global_batch_size} over {data_parallel_size} data-parallel ranks")
        if next_row < 0:
            raise ValueError(f"next_row {next_row}")
        self._stream = stream
        self._global_batch_size = global_batch_size
        local_batch_size = global_batch_size // data_parallel_size
        self._first_local = data_parallel_rank * local_batch_size
        self._local_batch_size = local_batch_size
        self._next_row = next_row
        self._prefetch_batches = prefetch_batches

    @property
    def state(self) -> StreamState:
        """Where the committed steps have come to."""
        return self._stream.state(self._next_row)

    def commit(self) -> None:
        """Records that a step has used one global batch."""
        self._next_row += self._global_batch_size

    def __iter__(self) -> Iterator[LoadedBatch]:
        """Yields this rank's slice of each global batch, from the state on, without end.

        Raises:
            DamagedDataError: when the batch that holds the damaged document is reached.
        """
        first_row = self._next_row

        def read_batch(number: int) -> LoadedBatch:
            first = first_row + number * self._global_batch_size + self._first_local
            return LoadedBatch(read_rows(self._stream, range(first, first + self._local_batch_size), self._first_local))

        if self._prefetch_batches:
            return _read_ahead(read_batch, self._prefetch_batches)
        return (read_batch(number) for number in itertools.count())


def read_rows(stream: RowStream, numbers: Sequence[int], first_index: int) -> TokenBatch:
    """Reads rows into a batch.

    Args:
        stream: rows.
        numbers: row numbers through all epochs, B of them.
        first_index: index of the first of these rows in its global batch.

    Returns:
        Tokens and document ids int64 [B, P], row indices int64 [B], in CPU memory.

    Raises:
        DamagedDataError: a document of these rows fails its check.
    """
    tokens = np.empty((len(numbers), stream.sequence_length), np.int64)
    document_ids = np.empty_like(tokens)
    for position, number in enumerate(numbers):
        row = stream.row(number)
        tokens[position] = row.tokens
        document_ids[position] = row.document_ids
    return TokenBatch(
        tokens=torch.from_numpy(tokens),
        document_ids=torch.from_numpy(document_ids),
        row_indices=torch.arange(first_index, first_index + len(numbers)),
    )


def fixed_rows(
    dataset: Dataset,
    sequence_length: int,
    num_rows: int,
    data_parallel_rank: int = 0,
    data_parallel_size: int = 1,
) -> TokenBatch:
    """The rows that every evaluation uses: the first ones in a fixed random order, none of them twice.

    Documents are packed in dataset order. Neighbouring rows often hold one long document, so the first rows
    of the dataset would speak for a few documents only. Fewer rows are a prefix of more rows.

    Args:
        dataset: the held-out dataset.
        sequence_length: tokens in a row, P.
        num_rows: rows over all ranks.
        data_parallel_rank: this rank's place in its data-parallel group.
        data_parallel_size: ranks in that group. Slices are contiguous and differ by at most one row.

    Returns:
        This rank's rows, [B, P]; `row_indices` counts over all ranks.

    Raises:
        InputError: the dataset holds fewer rows.
        DamagedDataError: a document fails its check.
    """
    stream = RowStream(dataset, sequence_length, seed=None)
    if not 0 < num_rows <= stream.rows_per_epoch:
        found = f"{num_rows} rows of {sequence_length} tokens"
        expected = f"at least 1 and at most {stream.rows_per_epoch}, which is what the dataset holds"
        raise bad_input(str(dataset.directory), "evaluation.rows", found, expected)
    first = num_rows * data_parallel_rank // data_parallel_size
    last = num_rows * (data_parallel_rank + 1) // data_parallel_size
    order = epoch_permutation(stream.rows_per_epoch, "rows", 0, 0, dataset.manifest.fingerprint)
    return read_rows(stream, order[first:last].tolist(), first)


def _read_ahead(read_batch: Callable[[int], LoadedBatch], num_batches: int) -> Iterator[LoadedBatch]:
    """Yields batches 0, 1, ... that a thread reads ahead; an error is raised in the place of its batch."""
    # One thread: batches are read in order, and neighbouring rows share the document that they have in
    # common.
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="row-prefetch")
    pending = deque(executor.submit(read_batch, number) for number in range(num_batches))
    try:
        for number in itertools.count(num_batches):
            batch = pending.popleft().result()
            pending.append(executor.submit(read_batch, number))
            yield batch
    finally:
        executor.shutdown(cancel_futures=True)
