import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebft_mega.data.rows import packing
from ebft_mega.data.rows.document_cache import DocumentCache
from ebft_mega.data.rows.stream import RowStream, Source
from ebft_mega.data.store.dataset import Dataset
from ebft_mega.errors import DamagedDataError, InputError
from tests.unit.data.memory_dataset import EOS, damage, memory_dataset

documents = st.lists(st.integers(2, 999), max_size=20)
shard_lists = st.lists(st.lists(documents, min_size=1, max_size=5), min_size=1, max_size=6)


def numbered(num_documents: int, length: int, name: str, shards: int = 3) -> Dataset:
    """Documents of equal length with tokens of their own: the number of the document, and a shift for the name."""
    shift = 2 + 300 * (ord(name) - ord("a"))
    made = [[shift + number] * (length - 1) for number in range(num_documents)]
    return memory_dataset([part.tolist() for part in np.array_split(np.array(made), shards)], name=name)


@given(shard_lists, st.integers(1, 50), st.integers(0, 2**63))
@settings(max_examples=40)
def test_a_row_holds_the_tokens_of_its_documents(
    shards: list[list[list[int]]], sequence_length: int, seed: int
) -> None:
    dataset = memory_dataset(shards)
    flat = [[*document, EOS] for shard in shards for document in shard]
    total = sum(map(len, flat))
    if total < sequence_length:
        return
    stream = RowStream.of(dataset, sequence_length, seed)
    places: dict[int, list[int]] = {}
    for number in range(-(-2 * total // sequence_length)):
        row = stream.row(number)
        for token, instance in zip(row.tokens.tolist(), row.document_ids.tolist(), strict=True):
            places.setdefault(instance, []).append(token)
    for epoch, number in itertools.product(range(2), range(len(flat))):
        assert sorted(places[epoch * len(flat) + number]) == sorted(flat[number])


def test_a_dataset_of_one_document_is_another_instance_in_the_next_epoch() -> None:
    stream = RowStream.of(memory_dataset([[[5, 6, 7]]]), 3, seed=0)
    ids = np.concatenate([stream.row(number).document_ids for number in range(4)])
    assert sorted(ids) == [0] * 4 + [1] * 4 + [2] * 4


def test_sources_take_turns_by_weight_and_each_loses_nothing() -> None:
    sources = [Source("a", numbered(20, 6, "a"), Fraction(7)), Source("b", numbered(30, 4, "b"), Fraction(3))]
    stream = RowStream(sources, 5, seed=1)
    rows = [stream.row(number) for number in range(400)]
    counts = [0, 0]
    for number, row in enumerate(rows, 1):
        counts[row.source] += 1
        assert all(abs(10 * counts[source] - share * number) < 10 for source, share in ((0, 7), (1, 3)))
        assert stream.rows_by_source(number) == tuple(counts)
    for source in (0, 1):
        alone = RowStream.of(sources[source].dataset, 5, seed=1)
        mine = [row for row in rows if row.source == source]
        assert all(np.array_equal(row.tokens, alone.row(number).tokens) for number, row in enumerate(mine))
    assert stream.total_rows is None
    assert stream.tail_tokens == (0, 0)


def test_a_source_stops_at_its_epochs_and_the_others_continue() -> None:
    sources = [
        Source("a", numbered(20, 6, "a"), Fraction(1, 2), max_epochs=1.5),  # 180 tokens: 25 rows of 7, and 5 left
        Source("b", numbered(10, 7, "b"), Fraction(1, 2), max_epochs=4),  # 280 tokens: 40 rows
    ]
    stream = RowStream(sources, 7, seed=1)
    assert stream.total_rows == 65
    assert stream.tail_tokens == (5, 0)
    found = [stream.row(number).source for number in range(65)]
    assert found[50:] == [1] * 15
    assert found.count(0) == 25
    assert stream.rows_by_source(65) == (25, 40)
    with pytest.raises(IndexError):
        stream.row(65)


def test_what_makes_sources_impossible_is_listed_at_once() -> None:
    small, other = numbered(2, 3, "b", shards=1), numbered(20, 6, "a")
    sources = [
        Source("x", other),
        Source("x", small),
        Source("y", other, max_epochs=0.05),
    ]
    with pytest.raises(InputError) as caught:
        RowStream(sources, 7, seed=1)
    assert [problem.key for problem in caught.value.problems] == ["tokens", "name", "max_epochs", "fingerprint"]
    foreign = numbered(20, 6, "b")
    manifest = foreign.manifest.model_copy(update={"tokenizer_sha256": "f" * 64})
    foreign = Dataset(foreign.directory, manifest, foreign.index, foreign.files)
    with pytest.raises(InputError, match="tokenizer"):
        RowStream([Source("x", other), Source("y", foreign)], 7, seed=1)
    for change, words in (
        ({"eos_id": 5}, "eos_id: found documents that end with token 5"),
        ({"vocab_size": 999}, "999"),
    ):
        manifest = numbered(20, 6, "b").manifest.model_copy(update=change)
        foreign = Dataset(foreign.directory, manifest, foreign.index, foreign.files)
        with pytest.raises(InputError, match=words):
            RowStream([Source("x", other), Source("y", foreign)], 7, seed=1)


def test_shards_are_announced_when_a_window_is_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = numbered(12, 4, "a", shards=6)  # 2 documents a shard
    monkeypatch.setattr(packing.PackedLine.__init__, "__defaults__", (4,))  # windows of two shards
    stream = RowStream.of(dataset, 4, seed=3)
    read: list[list[int]] = []
    for number in range(24):
        (document,) = set((stream.row(number).document_ids % 12).tolist())
        shard = int(dataset.index["shard"][document])
        if number % 4 == 0:
            read.append([])
        if shard not in read[-1]:
            read[-1].append(shard)
    announced = dataset.files.announced
    assert len(announced) == 6
    for number in range(5):
        assert set(announced[number][:2]) == set(read[number])
        assert set(announced[number][2:]) <= set(read[number + 1])
        assert set(announced[number]) == {*read[number], *read[number + 1]}


def test_long_documents_are_not_read_again_for_each_of_their_rows() -> None:
    dataset = memory_dataset([[[7] * 9999, *[[8] * 9 for _ in range(100)]]])
    stream = RowStream.of(dataset, 10, seed=2)
    for number in range(1100):
        stream.row(number)
    assert dataset.files.num_reads == 101
    without = RowStream([Source("a", dataset)], 10, 2, document_cache_bytes=0)
    for number in range(1100):
        without.row(number)
    assert dataset.files.num_reads > 101 + 1000


def test_the_document_cache_keeps_to_its_bytes() -> None:
    dataset = memory_dataset([[[7] * 50 for _ in range(10)], [[8] * 500]])  # 100 bytes each, and 1000
    cache = DocumentCache(dataset, limit_bytes=350)
    for number in (0, 1, 2, 0, 3):
        cache.tokens(number)
    reads = dataset.files.num_reads
    for number in (0, 2, 3):  # 1 was used the longest time ago
        cache.tokens(number)
    assert dataset.files.num_reads == reads == 4
    cache.tokens(1)
    assert dataset.files.num_reads == 5
    for _ in range(3):  # larger than the limit: kept alone, and given up for the next one
        assert cache.tokens(10).tolist() == [8] * 500
    assert dataset.files.num_reads == 6
    cache.tokens(3)
    cache.tokens(10)
    assert dataset.files.num_reads == 8


def test_a_damaged_document_is_never_handed_out() -> None:
    dataset = numbered(4, 5, "a", shards=1)
    damage(dataset, 2)
    stream = RowStream.of(dataset, 5, seed=None)
    for _ in range(2):
        with pytest.raises(DamagedDataError) as caught:
            stream.row(2)
        assert caught.value.document == 2
    stream.row(1)
    filler = stream.filler(2)
    assert filler.tokens.tolist() == [EOS] * 5
    assert len(set(filler.document_ids.tolist())) == 1
