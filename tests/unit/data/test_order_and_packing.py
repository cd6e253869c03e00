import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebft_mega.data.order import epoch_permutation
from ebft_mega.data.packing import document_ends, row_spans

lengths_lists = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@given(st.integers(0, 300), st.integers(0, 2**40), st.integers(0, 1000))
def test_an_epoch_visits_every_item_once(num_items: int, seed: int, epoch: int) -> None:
    order = epoch_permutation(num_items, "documents", seed, epoch, "a" * 64)
    assert sorted(order) == list(range(num_items))
    assert np.array_equal(order, epoch_permutation(num_items, "documents", seed, epoch, "a" * 64))


def test_order_depends_on_each_of_its_arguments() -> None:
    arguments = [
        ("documents", 1, 0, "a"),
        ("rows", 1, 0, "a"),
        ("documents", 2, 0, "a"),
        ("documents", 1, 1, "a"),
    ]
    arguments += [("documents", 1, 0, "b"), ("documents", 11, 0, "a"), ("documents", 1, 10, "a")]
    orders = [tuple(epoch_permutation(100, *each)) for each in arguments]
    assert len(set(orders)) == len(orders)
    assert tuple(range(100)) not in orders


def test_order_stays_the_same_from_release_to_release() -> None:
    # A changed value here means that running jobs would resume in another order.
    assert epoch_permutation(10, "documents", 0, 0, "f").tolist() == FIRST_ORDER


FIRST_ORDER = [6, 7, 9, 4, 5, 8, 3, 1, 2, 0]


def test_positions_are_uniform() -> None:
    counts = np.zeros((8, 8))
    for epoch in range(2000):
        counts[np.arange(8), epoch_permutation(8, "documents", 3, epoch, "f")] += 1
    chi_square = ((counts - 250) ** 2 / 250).sum()  # 49 degrees of freedom: 99.99 % below 95
    assert chi_square < 95


@given(lengths_lists, st.integers(1, 70))
def test_rows_cover_the_line_of_tokens_once(lengths: list[int], sequence_length: int) -> None:
    line = [(document, token) for document, length in enumerate(lengths) for token in range(length)]
    ends = document_ends(np.array(lengths))
    num_rows = len(line) // sequence_length
    packed = []
    for row in range(num_rows):
        spans = row_spans(ends, row, sequence_length)
        assert all(span.start < span.stop for span in spans)
        tokens = [(span.position, token) for span in spans for token in range(span.start, span.stop)]
        assert len(tokens) == sequence_length
        packed += tokens
    assert packed == line[: num_rows * sequence_length]
    for outside in (-1, num_rows):
        with pytest.raises(IndexError):
            row_spans(ends, outside, sequence_length)


def test_ends_do_not_overflow() -> None:
    lengths = np.full(5, 2**31 - 1, np.uint32)
    assert int(document_ends(lengths)[-1]) == 5 * (2**31 - 1)
