import itertools
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ebft_mega.data.rows.loader import BatchLoader, fixed_rows
from ebft_mega.data.rows.stream import RowStream
from ebft_mega.data.store.dataset import Dataset
from ebft_mega.data.store.opening import open_dataset
from ebft_mega.data.tokenizers.tokenizer import load_tokenizer
from ebft_mega.errors import InputError

EOS = 1


def rows_per_epoch(stream: RowStream) -> int:
    """Rows that one epoch fills, the last of them maybe with tokens of the next one too."""
    return -(-stream.sources[0].dataset.manifest.tokens // stream.sequence_length)


def pairs(stream: RowStream, num_rows: int) -> list[tuple[int, int]]:
    """Token and document id of every place in the first rows."""
    rows = map(stream.row, range(num_rows))
    return [pair for row in rows for pair in zip(row.tokens.tolist(), row.document_ids.tolist(), strict=True)]


def documents_of(dataset: Dataset) -> list[np.ndarray]:
    return [np.array([*dataset.tokens(number), EOS]) for number in range(dataset.manifest.documents)]


def test_stored_tokens_are_a_document_without_its_end(dataset: Dataset, texts: dict[str, str]) -> None:
    tokenizer = load_tokenizer(dataset.tokenizer_directory)
    for number in (0, 7, dataset.manifest.documents - 1):
        stored = dataset.tokens(number)
        assert stored.dtype == np.dtype(dataset.manifest.dtype)
        assert not stored.flags.writeable
        assert stored.tolist() == tokenizer.encode(texts[sorted(texts)[number]])
    with pytest.raises(IndexError):
        dataset.tokens(dataset.manifest.documents)


def test_without_a_seed_rows_are_the_naive_concatenation_epoch_after_epoch(
    dataset: Dataset, texts: dict[str, str]
) -> None:
    tokenizer = load_tokenizer(dataset.tokenizer_directory)
    line: list[tuple[int, int]] = []
    for epoch in range(3):
        for number, path in enumerate(sorted(texts)):
            line += [(token, epoch * len(texts) + number) for token in [*tokenizer.encode(texts[path]), EOS]]
    stream = RowStream.of(dataset, 32, seed=None)
    found = pairs(stream, len(line) // 32)
    assert found == line[: len(found)]


@settings(max_examples=25)
@given(seed=st.integers(0, 2**63), sequence_length=st.integers(1, 400))
def test_every_epoch_holds_every_token_once(dataset_directory: Path, seed: int, sequence_length: int) -> None:
    dataset = open_dataset(dataset_directory)
    stream = RowStream.of(dataset, sequence_length, seed)
    num_documents = dataset.manifest.documents
    per_instance: dict[int, list[int]] = {}
    for token, instance in pairs(stream, -(-2 * dataset.manifest.tokens // sequence_length)):
        per_instance.setdefault(instance, []).append(token)
    for number in range(num_documents):
        expected = sorted([*dataset.tokens(number), EOS])
        for epoch in range(2):
            assert sorted(per_instance.pop(epoch * num_documents + number)) == expected
    assert sum(map(len, per_instance.values())) < sequence_length  # the tail, in the third epoch's first row
    assert all(instance >= 2 * num_documents for instance in per_instance)
    dataset.close()


def test_rows_do_not_depend_on_when_they_are_read(dataset: Dataset) -> None:
    forward = RowStream.of(dataset, 24, seed=5)
    backward = RowStream.of(dataset, 24, seed=5)
    num_rows = rows_per_epoch(forward)
    numbers = range(3 * num_rows)
    expected = [tuple(forward.row(number).tokens) for number in numbers]
    assert [tuple(backward.row(number).tokens) for number in reversed(numbers)] == expected[::-1]
    assert expected[:num_rows] != expected[num_rows : 2 * num_rows]


def test_rows_of_a_long_document_are_spread_over_the_epoch(dataset: Dataset) -> None:
    stream = RowStream.of(dataset, 8, seed=0)
    longest = int(np.argmax(dataset.index["tokens"]))
    num_rows = rows_per_epoch(stream)
    where = [number for number in range(num_rows) if longest in stream.row(number).document_ids]
    assert len(where) > 10
    assert max(where) - min(where) > 0.5 * num_rows


def test_a_row_longer_than_the_dataset_is_refused(dataset: Dataset) -> None:
    RowStream.of(dataset, dataset.manifest.tokens, 0)
    with pytest.raises(InputError, match="sequence_length"):
        RowStream.of(dataset, dataset.manifest.tokens + 1, 0)


def take(stream: RowStream, num_batches: int, **options: int) -> list[torch.Tensor]:
    loader = BatchLoader(stream, 8, **options)
    return [batch.rows.tokens for batch in itertools.islice(loader, num_batches)]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_slice_the_same_global_batches(dataset: Dataset, size: int, workers: int) -> None:
    stream = RowStream.of(dataset, 16, seed=9)
    num_batches = 2 * rows_per_epoch(stream) // 8 + 1  # over epoch boundaries
    expected = [np.stack([stream.row(8 * b + i).tokens for i in range(8)]) for b in range(num_batches)]
    slices = [
        take(
            stream,
            num_batches,
            data_parallel_rank=rank,
            data_parallel_size=size,
            workers=workers,
        )
        for rank in range(size)
    ]
    for number in range(num_batches):
        assert np.array_equal(torch.cat([each[number] for each in slices]).numpy(), expected[number])


def test_batch_fields(dataset: Dataset) -> None:
    stream = RowStream.of(dataset, 16, seed=9)
    batch = next(iter(BatchLoader(stream, 8, data_parallel_rank=1, data_parallel_size=2, next_row=3))).rows
    assert batch.tokens.dtype == batch.document_ids.dtype == batch.row_indices.dtype == torch.int64
    assert batch.row_indices.tolist() == [4, 5, 6, 7]
    assert batch.document_ids[2].tolist() == stream.row(3 + 6).document_ids.tolist()


def test_state_moves_by_commits_only(dataset: Dataset) -> None:
    stream = RowStream.of(dataset, 16, seed=9)
    loader = BatchLoader(stream, 4, next_row=8)
    batches = iter(loader)
    first, second = next(batches).rows, next(batches).rows
    assert loader.state == stream.state(8)
    begun = iter(loader)
    assert torch.equal(next(iter(loader)).rows.tokens, first.tokens)
    loader.commit()
    assert loader.state == stream.state(12)
    assert torch.equal(next(begun).rows.tokens, first.tokens)  # it starts where the state was when it began
    resumed = BatchLoader(stream, 2, next_row=loader.state.next_row)  # another global batch size
    assert torch.equal(next(iter(resumed)).rows.tokens, second.tokens[:2])


@pytest.mark.parametrize("arguments", [(8, 2, 2), (8, 0, 3), (0, 0, 1), (8, 0, 1, -1)])
def test_impossible_layouts_are_refused(dataset: Dataset, arguments: tuple[int, ...]) -> None:
    with pytest.raises(ValueError):
        BatchLoader(RowStream.of(dataset, 16, 0), *arguments)


def test_fixed_rows_are_spread_and_never_repeat(dataset: Dataset) -> None:
    stream = RowStream.of(dataset, 16, seed=None)
    num_rows = dataset.manifest.tokens // 16
    rows = fixed_rows(dataset, 16, 10)
    assert torch.equal(rows.tokens, fixed_rows(dataset, 16, 20).tokens[:10])
    assert len(rows.document_ids.unique()) >= 5
    parts = [fixed_rows(dataset, 16, 10, rank, 4) for rank in range(4)]
    assert torch.equal(torch.cat([part.tokens for part in parts]), rows.tokens)
    assert torch.cat([part.row_indices for part in parts]).tolist() == list(range(10))
    everything = fixed_rows(dataset, 16, num_rows)
    expected = [stream.row(number).tokens.tolist() for number in range(num_rows)]
    assert sorted(everything.tokens.tolist()) == sorted(expected)
    with pytest.raises(InputError, match=r"evaluation\.rows"):
        fixed_rows(dataset, 16, num_rows + 1)


def _row_in_child(stream: RowStream, number: int, results: "multiprocessing.Queue[list[int]]") -> None:
    results.put(stream.row(number).tokens.tolist())


def test_a_forked_reader_gives_the_same_rows(dataset: Dataset) -> None:
    stream = RowStream.of(dataset, 16, seed=2)
    expected = stream.row(0).tokens.tolist()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_row_in_child, args=(stream, 0, results))
    child.start()
    assert results.get(timeout=30) == expected
    child.join(30)
    assert stream.row(0).tokens.tolist() == expected


def test_a_pickled_dataset_reads_again(dataset: Dataset) -> None:
    expected = dataset.tokens(3)
    copy = pickle.loads(pickle.dumps(dataset))
    dataset.close()
    assert np.array_equal(copy.tokens(3), expected)
    assert np.array_equal(dataset.tokens(3), expected)  # opened again after close
    copy.close()
