from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebft_mega.data.rows.order import FeistelPermutation, epoch_windows, permutation
from ebft_mega.data.rows.packing import PackedLine, document_ends, document_ranges

lengths_lists = st.lists(st.integers(1, 50), min_size=1, max_size=40)
shard_lists = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=6), min_size=1, max_size=8)


@given(st.integers(0, 300), st.integers(0, 2**40), st.integers(0, 1000))
def test_a_permutation_visits_every_item_once(num_items: int, seed: int, epoch: int) -> None:
    order = permutation(num_items, "documents", seed, epoch, "a" * 64)
    assert sorted(order) == list(range(num_items))
    assert np.array_equal(order, permutation(num_items, "documents", seed, epoch, "a" * 64))


def test_order_depends_on_each_part_of_its_name() -> None:
    names = [
        ("documents", 1, 0, "a"),
        ("rows", 1, 0, "a"),
        ("documents", 2, 0, "a"),
        ("documents", 1, 1, "a"),
    ]
    names += [("documents", 1, 0, "b"), ("documents", 11, 0, "a"), ("documents", 1, 10, "a")]
    for make in (permutation, feistel_order):
        orders = [tuple(make(100, *name)) for name in names]
        assert len(set(orders)) == len(orders)
        assert tuple(range(100)) not in orders


def feistel_order(num_items: int, *name: object) -> list[int]:
    order = FeistelPermutation(num_items, *name)
    return [order.item_at(position) for position in range(num_items)]


def test_order_stays_the_same_from_release_to_release() -> None:
    # A changed value here means that running jobs would resume in another order.
    assert permutation(10, "documents", 0, 0, "f").tolist() == FIRST_ORDER
    assert feistel_order(10, "rows", 0, 0, 0, "f") == FIRST_FEISTEL_ORDER


FIRST_ORDER = [6, 7, 9, 4, 5, 8, 3, 1, 2, 0]
FIRST_FEISTEL_ORDER = [9, 6, 2, 5, 1, 8, 0, 4, 7, 3]


@given(st.integers(1, 3000), st.integers(0, 2**63))
def test_feistel_is_a_permutation_of_any_number_of_items(num_items: int, seed: int) -> None:
    assert sorted(feistel_order(num_items, "rows", seed)) == list(range(num_items))


@given(st.integers(1, 2**40), st.data())
@settings(max_examples=25)
def test_feistel_never_gives_an_item_twice_in_a_large_range(num_items: int, data: st.DataObject) -> None:
    order = FeistelPermutation(min(num_items, 2**26), "rows", 0)
    positions = data.draw(st.sets(st.integers(0, len(order) - 1), max_size=50))
    items = {order.item_at(position) for position in positions}
    assert len(items) == len(positions)
    assert all(0 <= item < len(order) for item in items)


def test_feistel_refuses_positions_outside() -> None:
    order = FeistelPermutation(5, "rows")
    for outside in (-1, 5):
        with pytest.raises(IndexError):
            order.item_at(outside)
    with pytest.raises(ValueError):
        FeistelPermutation(0, "rows")


@pytest.mark.parametrize("make", [permutation, feistel_order])
def test_positions_are_uniform(make: "type[permutation]") -> None:
    counts = np.zeros((8, 8))
    pairs: Counter[tuple[int, int]] = Counter()
    for epoch in range(2000):
        order = make(8, "rows", 3, epoch, "f")
        counts[np.arange(8), order] += 1
        pairs[int(order[2]), int(order[3])] += 1
    chi_square = ((counts - 250) ** 2 / 250).sum()  # 49 degrees of freedom: 99.99 % below 95
    assert chi_square < 95
    expected = 2000 / 56
    found = [pairs[first, second] for first in range(8) for second in range(8) if first != second]
    assert sum((count - expected) ** 2 / expected for count in found) < 103  # 55 degrees of freedom, 99.99 %


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(1, 60), st.integers(0, 99))
def test_windows_are_whole_shards_up_to_the_first_that_fills_them(
    shard_documents: list[int], window_documents: int, epoch: int
) -> None:
    windows = epoch_windows(np.array(shard_documents), 7, epoch, "f", window_documents)
    groups = [windows.shards_of(number).tolist() for number in range(len(windows))]
    assert sorted(shard for group in groups for shard in group) == list(range(len(shard_documents)))
    for number, group in enumerate(groups):
        held = [shard_documents[shard] for shard in group]
        assert sum(held[:-1]) < window_documents
        assert sum(held) >= window_documents or number == len(groups) - 1
    in_order = epoch_windows(np.array(shard_documents), None, epoch, "f", window_documents)
    assert in_order.shards.tolist() == list(range(len(shard_documents)))


@given(lengths_lists, st.data())
def test_document_ranges_are_the_naive_ones(lengths: list[int], data: st.DataObject) -> None:
    line = [(document, token) for document, length in enumerate(lengths) for token in range(length)]
    begin = data.draw(st.integers(0, len(line)))
    end = data.draw(st.integers(begin, len(line)))
    found = document_ranges(document_ends(np.array(lengths)), begin, end)
    assert all(first < last for _, first, last in found)
    assert [(position, token) for position, first, last in found for token in range(first, last)] == line[begin:end]


def test_ends_do_not_overflow() -> None:
    lengths = np.full(5, 2**31 - 1, np.uint32)
    assert int(document_ends(lengths)[-1]) == 5 * (2**31 - 1)


def packed_line(shards: list[list[int]], sequence_length: int, seed: int | None, window_documents: int) -> PackedLine:
    lengths = np.array([length for shard in shards for length in shard])
    counts, tokens = [len(shard) for shard in shards], [sum(shard) for shard in shards]
    return PackedLine(counts, tokens, lengths, "f", sequence_length, seed, window_documents)


def tokens_of(line: PackedLine, row: int) -> list[tuple[int, int, int]]:
    return [
        (span.epoch, span.document, token) for span in line.spans_of_row(row) for token in range(span.start, span.stop)
    ]


@given(shard_lists, st.integers(1, 70), st.integers(0, 2**63), st.integers(1, 40))
@settings(max_examples=60)
def test_every_token_stands_in_one_row_of_every_epoch(
    shards: list[list[int]], sequence_length: int, seed: int, window_documents: int
) -> None:
    line = packed_line(shards, sequence_length, seed, window_documents)
    epochs = 3
    num_rows = -(-epochs * line.tokens_per_epoch // sequence_length)
    seen: Counter[tuple[int, int, int]] = Counter()
    for row in range(num_rows):
        tokens = tokens_of(line, row)
        assert len(tokens) == sequence_length
        seen.update(tokens)
    assert max(seen.values()) == 1
    lengths = [length for shard in shards for length in shard]
    whole = {(e, d, t) for e in range(epochs) for d, length in enumerate(lengths) for t in range(length)}
    assert whole <= seen.keys()
    carried = seen.keys() - whole  # the last row runs over the end of the last epoch, and carries its tail on
    assert len(carried) == num_rows * sequence_length - len(whole) < sequence_length
    assert all(epoch >= epochs for epoch, _, _ in carried)


@given(shard_lists, st.integers(1, 40), st.integers(0, 2**63), st.integers(1, 40), st.randoms())
@settings(max_examples=30)
def test_a_row_does_not_depend_on_what_was_read_before(
    shards: list[list[int]], sequence_length: int, seed: int, window_documents: int, random: "object"
) -> None:
    arguments = (shards, sequence_length, seed, window_documents)
    line = packed_line(*arguments)
    rows = list(range(3 * line.tokens_per_epoch // sequence_length + 1))
    expected = [line.spans_of_row(row) for row in rows]
    random.shuffle(rows)  # type: ignore[attr-defined]
    other = packed_line(*arguments)
    assert all(other.spans_of_row(row) == expected[row] for row in rows)
    assert packed_line(*arguments).spans_of_row(rows[0]) == expected[rows[0]]


@given(shard_lists, st.integers(1, 70), st.integers(1, 40))
@settings(max_examples=30)
def test_without_a_seed_rows_are_the_documents_in_a_row(
    shards: list[list[int]], sequence_length: int, window_documents: int
) -> None:
    line = packed_line(shards, sequence_length, None, window_documents)
    lengths = [length for shard in shards for length in shard]
    naive = [(e, d, t) for e in range(3) for d, length in enumerate(lengths) for t in range(length)]
    num_rows = len(naive) // sequence_length
    found = [token for row in range(num_rows) for token in tokens_of(line, row)]
    assert found == naive[: len(found)]


def test_every_epoch_has_an_order_of_its_own() -> None:
    line = packed_line([[3] * 50], 3, 1, window_documents=1000)  # one window an epoch, rows of one document
    windows = [line.window_of_row(50 * epoch) for epoch in range(3)]
    documents = [window.documents.tolist() for window in windows]
    rows = [[line.chunk_of_row(50 * epoch + row) - 50 * epoch for row in range(50)] for epoch in range(3)]
    for orders in (documents, rows):
        assert all(sorted(order) == list(range(50)) for order in orders)
        assert len({tuple(order) for order in [*orders, range(50)]}) == 4
    assert documents[0] != rows[0]


def test_documents_mix_within_a_window_and_no_further() -> None:
    shards = [[3] * 10 for _ in range(12)]
    line = packed_line(shards, 3, 1, window_documents=25)  # windows of three shards, rows of one document
    for first in range(0, 120, 30):
        window = line.window_of_row(first)
        order = window.documents.tolist()
        assert {document // 10 for document in order} == {
            line.spans_of_row(first + row)[0].document // 10 for row in range(30)
        }
        assert len({document // 10 for document in order}) == 3
        # Neighbours of one shard are 9/29 of all in a full shuffle; in unmixed shards nearly all.
        assert sum(a // 10 == b // 10 for a, b in zip(order, order[1:], strict=False)) < 20
        assert order != sorted(order)


def test_neighbouring_chunks_of_a_long_document_are_spread() -> None:
    line = packed_line([[50_000, *[100] * 500]], 100, 5, window_documents=1000)
    where = [row for row in range(1000) if any(span.document == 0 for span in line.spans_of_row(row))]
    assert 500 <= len(where) <= 502
    assert min(where) < 20
    assert max(where) > 980
    assert 200 < sum(row < 500 for row in where) < 300
