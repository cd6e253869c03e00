"""Load this rank's rows of each global batch, read ahead by a thread or by worker processes."""

import itertools
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ebft_mega.data.rows.order import permutation
from ebft_mega.data.rows.row_ranges import RowRanges
from ebft_mega.data.rows.stream import Row, RowStream
from ebft_mega.data.rows.stream_state import StreamState, check_resumable, resumed_row
from ebft_mega.data.store.dataset import Dataset
from ebft_mega.errors import DamagedDataError
from ebft_mega.io.child_processes import obey_the_parent_only, signals_blocked
from ebft_mega.io.input_errors import bad_input
from ebft_mega.types import TokenBatch

PREFETCH_BATCHES = 2  # read ahead by the thread, or by each worker process

OnError = Literal["raise", "skip"]


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
    left_out: int = 0  # rows of the whole global batch that were not to be read, and are filler, too


class BatchLoader:
    """The batches of one data-parallel rank, as many as there are whole global batches.

    Global batch b holds rows [b * global_batch_size, (b + 1) * global_batch_size) counted from `next_row`; a rank
    gets a contiguous range of them. Tensor- and pipeline-parallel peers pass the same data-parallel rank and so read
    the same rows. All ranks end at the same batch. The state advances when a step commits, never by reading ahead;
    every new iteration starts at the state. Neither the order nor the end depends on the number of workers.

    Args:
        stream: rows in training order.
        global_batch_size: rows of an optimizer step over all ranks.
        data_parallel_rank: this rank's place in its data-parallel group.
        data_parallel_size: ranks in that group; divides `global_batch_size`.
        next_row: first row to use, counted through the whole run.
        workers: processes that read ahead, whole batches in turn; 0 uses a thread of this process. Processes are
            forked when an iteration starts, and end with it or with this process.
        pin_memory: hand out page-locked memory; needs an accelerator.
        on_error: "raise" stops at a row that cannot be read, "skip" puts filler in its place and reports it.
        left_out: rows that are never read; filler is in their place.
    """

    def __init__(
        self,
        stream: RowStream,
        global_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        next_row: int = 0,
        *,
        workers: int = 0,
        pin_memory: bool = False,
        on_error: OnError = "raise",
        left_out: RowRanges | None = None,
    ):
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise ValueError(f"data-parallel rank {data_parallel_rank} of {data_parallel_size}")
        if global_batch_size < 1 or global_batch_size % data_parallel_size:
            raise ValueError(f"global batch size {global_batch_size} over {data_parallel_size} data-parallel ranks")
        if next_row < 0:
            raise ValueError(f"next_row {next_row}")
        if workers < 0:
            raise ValueError(f"workers {workers}")
        if pin_memory and not torch.accelerator.is_available():
            raise ValueError("pinned memory without an accelerator")
        self._stream = stream
        self._global_batch_size = global_batch_size
        local_batch_size = global_batch_size // data_parallel_size
        first_index = data_parallel_rank * local_batch_size
        self._indices = range(first_index, first_index + local_batch_size)
        self._next_row = next_row
        self._skipped_rows = 0
        self._workers = workers
        self._pin_memory = pin_memory
        self._on_error = on_error
        self._left_out = left_out or RowRanges()

    @property
    def stream(self) -> RowStream:
        """The rows that the batches are cut from."""
        return self._stream

    @property
    def skips_damaged_rows(self) -> bool:
        """Whether a row that cannot be read becomes filler."""
        return self._on_error == "skip"

    @property
    def state(self) -> StreamState:
        """The state after the committed steps."""
        return self._stream.state(self._next_row, self._skipped_rows)

    def commit(self, skipped_rows: int = 0) -> None:
        """Record that a step has used one global batch.

        Args:
            skipped_rows: rows of it that were filler, over all ranks.
        """
        self._next_row += self._global_batch_size
        self._skipped_rows += skipped_rows

    def resume(self, saved: StreamState, allow_changed: bool = False) -> list[str]:
        """Resume from a saved state; call it before iterating.

        Args:
            saved: the state of a run with any number of ranks and workers and any global batch size.
            allow_changed: resume with data that has changed.

        Returns:
            What has changed, in words for the user; empty if nothing has.

        Raises:
            InputError: the data has changed and `allow_changed` is false, or its rows end before the state.
        """
        next_row = resumed_row(saved, self._stream.sequence_length)
        total = self._stream.total_rows
        if total is not None and next_row > total:
            raise bad_input("resuming", "next_row", f"{total} rows in all", f"at least the {next_row} used before")
        notes = check_resumable(saved, self._stream.state(next_row), allow_changed)
        self._next_row, self._skipped_rows = next_row, saved.skipped_rows
        return notes

    def __iter__(self) -> Generator[LoadedBatch, None, None]:
        """Yield this rank's rows of each whole global batch, from the state on.

        Raises:
            DamagedDataError: when the batch that holds the damaged document is reached.
        """
        first = self._next_row
        total = self._stream.total_rows
        numbers: Iterator[int] = (
            itertools.count(first, self._global_batch_size)
            if total is None
            else iter(range(first, total - self._global_batch_size + 1, self._global_batch_size))
        )
        return self._batches(numbers)

    def _batches(self, numbers: Iterator[int]) -> Generator[LoadedBatch, None, None]:
        """The batches that begin with these rows."""
        reader = _BatchReader(self._stream, self._indices, self._global_batch_size, self._on_error, self._left_out)
        read_ahead = _with_processes if self._workers else _with_thread
        for delivery in read_ahead(reader, numbers, self._workers, self._pin_memory):
            if isinstance(delivery, DamagedDataError):
                raise delivery
            yield delivery


@dataclass(frozen=True)
class _ReadRows:
    """A batch as arrays.

    Unlike tensors they are sent from process to process in one message: the receiver fetches nothing from the sender
    later, when that may have ended.
    """

    tokens: np.ndarray  # int64 [B, P]
    document_ids: np.ndarray  # int64 [B, P]
    indices: np.ndarray  # int64 [B]
    skipped: tuple[SkippedRow, ...] = ()
    left_out: int = 0

    def batch(self) -> LoadedBatch:
        """The same batch as tensors in the same memory."""
        tokens, document_ids, indices = map(torch.from_numpy, (self.tokens, self.document_ids, self.indices))
        return LoadedBatch(TokenBatch(tokens, document_ids, indices), self.skipped, self.left_out)

    def pin_memory(self) -> LoadedBatch:
        """The same batch in page-locked memory, from which copies to an accelerator need not wait."""
        rows = self.batch().rows
        pinned = TokenBatch(rows.tokens.pin_memory(), rows.document_ids.pin_memory(), rows.row_indices.pin_memory())
        return LoadedBatch(pinned, self.skipped, self.left_out)


class _BatchReader(TorchDataset[_ReadRows | DamagedDataError]):
    """Read this rank's rows of the global batch that begins with a row.

    It returns an error instead of raising it, since not the process that reads should stop, but the one that iterates.
    """

    def __init__(
        self, stream: RowStream, indices: range, global_batch_size: int, on_error: OnError, left_out: RowRanges
    ):
        self._stream = stream
        self._indices = indices
        self._global_batch_size = global_batch_size
        self._on_error = on_error
        self._left_out = left_out

    def __getitem__(self, first_row: int) -> _ReadRows | DamagedDataError:
        rows = []
        skipped = []
        indices = np.arange(self._indices.start, self._indices.stop)
        for place, index in enumerate(self._indices):
            number = first_row + index
            if number in self._left_out:
                rows.append(self._stream.filler(number))
                indices[place] = -1
                continue
            try:
                rows.append(self._stream.row(number))
            except DamagedDataError as damage:
                if self._on_error == "raise":
                    return damage
                skipped.append(SkippedRow(number, index, damage))
                rows.append(self._stream.filler(number))
                indices[place] = -1
        left_out = self._left_out.count(first_row, first_row + self._global_batch_size)
        return _read_rows(rows, indices, tuple(skipped), left_out)


def _read_rows(
    rows: list[Row], indices: np.ndarray, skipped: tuple[SkippedRow, ...] = (), left_out: int = 0
) -> _ReadRows:
    tokens, document_ids = np.stack([row.tokens for row in rows]), np.stack([row.document_ids for row in rows])
    return _ReadRows(tokens, document_ids, indices, skipped, left_out)


def _with_thread(
    reader: _BatchReader, numbers: Iterator[int], workers: int, pin_memory: bool
) -> Iterator[LoadedBatch | DamagedDataError]:
    """Read the batches ahead in one thread of this process, in order."""

    def read(number: int) -> LoadedBatch | DamagedDataError:
        delivery = reader[number]
        if isinstance(delivery, DamagedDataError):
            return delivery
        return delivery.pin_memory() if pin_memory else delivery.batch()

    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="row-prefetch")
    pending = deque(executor.submit(read, number) for number in itertools.islice(numbers, PREFETCH_BATCHES))
    try:
        while pending:
            delivery = pending.popleft().result()
            pending.extend(executor.submit(read, number) for number in itertools.islice(numbers, 1))
            yield delivery
    finally:
        executor.shutdown(cancel_futures=True)


def _with_processes(
    reader: _BatchReader, numbers: Iterator[int], workers: int, pin_memory: bool
) -> Iterator[LoadedBatch | DamagedDataError]:
    """Read the batches ahead in forked processes, each a whole batch in turn; they arrive in order."""
    loader: Iterable[_ReadRows | LoadedBatch | DamagedDataError] = DataLoader(
        reader,
        batch_size=None,
        sampler=_Numbers(numbers),
        num_workers=workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        prefetch_factor=PREFETCH_BATCHES,
        multiprocessing_context="fork",
        worker_init_fn=partial(_obey_the_rank_only, os.getpid()),
        # Without a generator of its own it would draw from the run's global one.
        generator=torch.Generator(),
    )
    with signals_blocked():  # inherited by the forks
        deliveries = iter(loader)
    for delivery in deliveries:
        yield delivery.batch() if isinstance(delivery, _ReadRows) else delivery  # else pinned, or an error


def _obey_the_rank_only(rank: int, worker: int) -> None:
    """Make worker process number `worker` of the process `rank` leave signals to it, and end with it."""
    obey_the_parent_only(rank)


class _Numbers:
    """Row numbers as a sampler, which must be iterable and may be endless."""

    def __init__(self, numbers: Iterator[int]):
        self._numbers = numbers

    def __iter__(self) -> Iterator[int]:
        return self._numbers


def _unchanged(delivery: Any) -> Any:
    """Return a batch as it is: torch's loader would convert it otherwise."""
    return delivery


def fixed_rows(
    dataset: Dataset,
    sequence_length: int,
    num_rows: int,
    data_parallel_rank: int = 0,
    data_parallel_size: int = 1,
) -> TokenBatch:
    """The rows that every evaluation uses: the first ones in a fixed random order, none of them twice.

    Documents are packed in dataset order. Neighbouring rows often hold one long document, so the first rows of the
    dataset would represent a few documents only. Fewer rows are a prefix of more rows.

    Args:
        dataset: the held-out dataset.
        sequence_length: tokens in a row, P.
        num_rows: rows over all ranks.
        data_parallel_rank: this rank's place in its data-parallel group.
        data_parallel_size: ranks in that group. Each gets a contiguous range; their sizes differ by at most one row.

    Returns:
        This rank's rows, [B, P]; `row_indices` counts over all ranks.

    Raises:
        InputError: the dataset holds fewer whole rows.
        DamagedDataError: a document fails its check.
    """
    stream = RowStream.of(dataset, sequence_length, seed=None)
    rows_per_epoch = dataset.manifest.tokens // sequence_length
    if not 0 < num_rows <= rows_per_epoch:
        found = f"{num_rows} rows of {sequence_length} tokens"
        expected = f"at least 1 and at most {rows_per_epoch}, which is what the dataset holds"
        raise bad_input(str(dataset.directory), "evaluation.rows", found, expected)
    first = num_rows * data_parallel_rank // data_parallel_size
    last = num_rows * (data_parallel_rank + 1) // data_parallel_size
    order = permutation(rows_per_epoch, "rows", 0, 0, dataset.manifest.fingerprint)
    rows = [stream.row(number) for number in order[first:last].tolist()]
    return _read_rows(rows, np.arange(first, last)).batch().rows
