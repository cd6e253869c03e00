"""120 steps with stops, on another number of ranks each time: the rows of one uninterrupted run."""

import hashlib
import itertools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest

from ebft_mega.data.rows.loader import BatchLoader
from ebft_mega.data.rows.stream import RowStream, Source
from ebft_mega.data.rows.stream_state import StreamState
from tests.unit.data.memory_dataset import memory_dataset

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than there are cores

BATCH = 8


def make_stream() -> RowStream:
    """A new stream over new datasets, as a new process has them: two sources, one of which ends on the way."""
    random = np.random.default_rng(0)
    sources = []
    for name, weight, max_epochs in (("a", Fraction(3, 5), None), ("b", Fraction(2, 5), 0.8)):
        shards = [
            [random.integers(2, 1000, random.integers(0, 90)).tolist() for _ in range(random.integers(1, 30))]
            for _ in range(12)
        ]
        sources.append(Source(name, memory_dataset(shards, name=name), weight, max_epochs))
    return RowStream(sources, 24, seed=11)


def steps(state: str | None, num_steps: int, size: int, workers: int, batch_size: int = BATCH) -> tuple[list[str], str]:
    """The hashes of the rows of some steps in order, over all ranks, and the state behind them as JSON."""
    stream = make_stream()
    loaders = [BatchLoader(stream, batch_size, rank, size, workers=workers) for rank in range(size)]
    if state is not None:
        for loader in loaders:
            assert loader.resume(StreamState.from_json(state)) == []
    hashes = []
    with_all = zip(*map(iter, loaders), strict=True)
    for batches in itertools.islice(with_all, num_steps):
        for loader in loaders:
            loader.commit()
        for batch in batches:
            for tokens, ids in zip(batch.rows.tokens, batch.rows.document_ids, strict=True):
                hashes.append(hashlib.sha256(tokens.numpy().tobytes() + ids.numpy().tobytes()).hexdigest())
        assert [index for batch in batches for index in batch.rows.row_indices.tolist()] == list(range(batch_size))
    (saved,) = {loader.state.to_json() for loader in loaders}
    return hashes, saved


@pytest.fixture(scope="module")
def uninterrupted() -> Sequence[str]:
    """120 steps on one rank without workers, read straight from the stream."""
    stream = make_stream()
    rows = map(stream.row, range(120 * BATCH))
    return [hashlib.sha256(row.tokens.tobytes() + row.document_ids.tobytes()).hexdigest() for row in rows]


def test_the_run_is_long_enough_to_say_something() -> None:
    stream = make_stream()
    rows = stream.rows_by_source(120 * BATCH)
    assert rows[1] < 120 * BATCH * 0.4 - 1  # the second source has come to its end
    epochs = rows[0] * 24 / stream.sources[0].dataset.manifest.tokens
    assert epochs > 1


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_stops_and_other_ranks_change_nothing(uninterrupted: Sequence[str], workers: int) -> None:
    state: str | None = None
    found: list[str] = []
    for size, num_steps in ((4, 31), (2, 40), (8, 9), (1, 40)):
        hashes, state = steps(state, num_steps, size, workers)
        found += hashes
    assert found == uninterrupted
    assert state is not None
    assert StreamState.from_json(state).next_row == 120 * BATCH


def test_another_global_batch_size_keeps_the_rows(uninterrupted: Sequence[str]) -> None:
    first, state = steps(None, 30, 4, 0)
    second, state = steps(state, 48, 2, 1, batch_size=10)
    third, _ = steps(state, 15, 8, 0, batch_size=16)
    assert first + second + third == uninterrupted
