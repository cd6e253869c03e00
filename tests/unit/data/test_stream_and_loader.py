import itertools
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ebft_mega.data.dataset import Dataset
from ebft_mega.data.loader import BatchLoader, fixed_rows
from ebft_mega.data.opening import open_dataset
from ebft_mega.data.stream import RowStream, StreamState
from ebft_mega.data.tokenizer import load_tokenizer
from ebft_mega.errors import DamagedDataError, InputError

EOS = 1


def epoch_rows(stream: RowStream, epoch: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    numbers = range(epoch * stream.rows_per_epoch, (epoch + 1) * stream.rows_per_epoch)
    return [(tuple(row.tokens), tuple(row.document_ids)) for row in map(stream.row, numbers)]


def documents_of(dataset: Dataset) -> list[np.ndarray]:
    return [dataset.read_document(number) for number in range(dataset.manifest.documents)]


def test_document_order_is_the_naive_concatenation(dataset: Dataset, texts: dict[str, str]) -> None:
    tokenizer = load_tokenizer(dataset.tokenizer_directory)
    line: list[tuple[int, int]] = []
    for number, path in enumerate(sorted(texts)):
        line += [(token, number) for token in [*tokenizer.encode(texts[path]), EOS]]
    stream = RowStream(dataset, 32, seed=None)
    assert (stream.rows_per_epoch, stream.tail_tokens) == divmod(len(line), 32)
    for epoch in (0, 1):
        found = [pair for tokens, ids in epoch_rows(stream, epoch) for pair in zip(tokens, ids, strict=True)]
        assert found == line[: len(found)]


@settings(max_examples=25)
@given(seed=st.integers(0, 2**63), epoch=st.integers(0, 50), sequence_length=st.integers(1, 400))
def test_every_epoch_holds_every_token_but_the_tail_once(
    dataset_directory: Path, seed: int, epoch: int, sequence_length: int
) -> None:
    dataset = open_dataset(dataset_directory)
    stream = RowStream(dataset, sequence_length, seed)
    rows = epoch_rows(stream, epoch)
    per_document: dict[int, list[int]] = {}
    for tokens, ids in rows:
        for token, document in zip(tokens, ids, strict=True):
            per_document.setdefault(document, []).append(token)
    expected = {number: sorted(tokens) for number, tokens in enumerate(documents_of(dataset))}
    missing = sum(len(tokens) for tokens in expected.values()) - sum(map(len, per_document.values()))
    assert missing == stream.tail_tokens < sequence_length
    incomplete = 0
    for document, tokens in expected.items():
        found = sorted(per_document.get(document, []))
        incomplete += found != tokens
        counts = np.bincount(tokens, minlength=400) - np.bincount(np.array(found, int), minlength=400)
        assert (counts >= 0).all()  # nothing twice
    assert incomplete <= stream.tail_tokens
    dataset.close()


def test_rows_do_not_depend_on_when_they_are_read(dataset: Dataset) -> None:
    forward = RowStream(dataset, 24, seed=5)
    backward = RowStream(dataset, 24, seed=5)
    numbers = range(3 * forward.rows_per_epoch)
    expected = [tuple(forward.row(number).tokens) for number in numbers]
    assert [tuple(backward.row(number).tokens) for number in reversed(numbers)] == expected[::-1]
    assert expected[: forward.rows_per_epoch] != expected[forward.rows_per_epoch : 2 * forward.rows_per_epoch]


def test_rows_of_a_long_document_are_spread_over_the_epoch(dataset: Dataset) -> None:
    stream = RowStream(dataset, 8, seed=0)
    longest = int(np.argmax(dataset.index["tokens"]))
    where = [number for number, (_, ids) in enumerate(epoch_rows(stream, 0)) if longest in ids]
    assert len(where) > 10
    assert max(where) - min(where) > 0.5 * stream.rows_per_epoch


def test_a_row_longer_than_the_dataset_is_refused(dataset: Dataset) -> None:
    RowStream(dataset, dataset.manifest.tokens, 0)
    with pytest.raises(InputError, match="sequence_length"):
        RowStream(dataset, dataset.manifest.tokens + 1, 0)


def take(stream: RowStream, num_batches: int, **options: int) -> list[torch.Tensor]:
    loader = BatchLoader(stream, 8, **options)
    return [batch.rows.tokens for batch in itertools.islice(loader, num_batches)]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("prefetch_batches", [0, 1, 5])
def test_ranks_slice_the_same_global_batches(dataset: Dataset, size: int, prefetch_batches: int) -> None:
    stream = RowStream(dataset, 16, seed=9)
    num_batches = 2 * stream.rows_per_epoch // 8 + 1  # over epoch boundaries
    expected = [np.stack([stream.row(8 * b + i).tokens for i in range(8)]) for b in range(num_batches)]
    slices = [
        take(
            stream,
            num_batches,
            data_parallel_rank=rank,
            data_parallel_size=size,
            prefetch_batches=prefetch_batches,
        )
        for rank in range(size)
    ]
    for number in range(num_batches):
        assert np.array_equal(torch.cat([each[number] for each in slices]).numpy(), expected[number])


def test_batch_fields(dataset: Dataset) -> None:
    stream = RowStream(dataset, 16, seed=9)
    batch = next(iter(BatchLoader(stream, 8, data_parallel_rank=1, data_parallel_size=2, next_row=3))).rows
    assert batch.tokens.dtype == batch.document_ids.dtype == batch.row_indices.dtype == torch.int64
    assert batch.row_indices.tolist() == [4, 5, 6, 7]
    assert batch.document_ids[2].tolist() == stream.row(3 + 6).document_ids.tolist()


def test_state_moves_by_commits_only(dataset: Dataset) -> None:
    stream = RowStream(dataset, 16, seed=9)
    loader = BatchLoader(stream, 4, next_row=8)
    batches = iter(loader)
    first, second = next(batches).rows, next(batches).rows
    assert loader.state == StreamState(9, 8, dataset.manifest.fingerprint, 16)
    assert torch.equal(next(iter(loader)).rows.tokens, first.tokens)
    loader.commit()
    assert loader.state.next_row == 12
    resumed = BatchLoader(stream, 2, next_row=loader.state.next_row)  # another global batch size
    assert torch.equal(next(iter(resumed)).rows.tokens, second.tokens[:2])


def test_an_error_in_the_background_reaches_the_consumer_in_its_place(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = RowStream(dataset, 16, seed=9)
    read = stream.row

    def fail_at_ten(number: int) -> object:
        if number == 10:
            raise DamagedDataError("shard", None, "row 10", "nothing")
        return read(number)

    monkeypatch.setattr(stream, "row", fail_at_ten)
    batches = iter(BatchLoader(stream, 4, prefetch_batches=3))
    next(batches), next(batches)
    with pytest.raises(DamagedDataError, match="row 10"):
        next(batches)


@pytest.mark.parametrize("arguments", [(8, 2, 2), (8, 0, 3), (0, 0, 1), (8, 0, 1, -1)])
def test_impossible_layouts_are_refused(dataset: Dataset, arguments: tuple[int, ...]) -> None:
    with pytest.raises(ValueError):
        BatchLoader(RowStream(dataset, 16, 0), *arguments)


def test_fixed_rows_are_spread_and_never_repeat(dataset: Dataset) -> None:
    stream = RowStream(dataset, 16, seed=None)
    rows = fixed_rows(dataset, 16, 10)
    assert torch.equal(rows.tokens, fixed_rows(dataset, 16, 20).tokens[:10])
    assert len(rows.document_ids.unique()) >= 5
    parts = [fixed_rows(dataset, 16, 10, rank, 4) for rank in range(4)]
    assert torch.equal(torch.cat([part.tokens for part in parts]), rows.tokens)
    assert torch.cat([part.row_indices for part in parts]).tolist() == list(range(10))
    everything = fixed_rows(dataset, 16, stream.rows_per_epoch)
    expected = [stream.row(number).tokens.tolist() for number in range(stream.rows_per_epoch)]
    assert sorted(everything.tokens.tolist()) == sorted(expected)
    with pytest.raises(InputError, match=r"evaluation\.rows"):
        fixed_rows(dataset, 16, stream.rows_per_epoch + 1)


def _row_in_child(stream: RowStream, number: int, results: "multiprocessing.Queue[list[int]]") -> None:
    results.put(stream.row(number).tokens.tolist())


def test_a_forked_reader_gives_the_same_rows(dataset: Dataset) -> None:
    stream = RowStream(dataset, 16, seed=2)
    expected = stream.row(0).tokens.tolist()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_row_in_child, args=(stream, 0, results))
    child.start()
    assert results.get(timeout=30) == expected
    child.join()
    assert stream.row(0).tokens.tolist() == expected


def test_a_pickled_dataset_reads_again(dataset: Dataset) -> None:
    expected = dataset.read_document(3)
    copy = pickle.loads(pickle.dumps(dataset))
    dataset.close()
    assert np.array_equal(copy.read_document(3), expected)
    assert np.array_equal(dataset.read_document(3), expected)  # opened again after close
    copy.close()
