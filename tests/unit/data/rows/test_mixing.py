import math
from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebft_mega.data.rows.mixing import MAX_PERIOD, Mixture, assignment, integer_weights, nearest_shares
from ebft_mega.errors import InputError

share_lists = st.lists(st.integers(1, 40), min_size=1, max_size=7)


def largest_deviation(rows: Sequence[int], shares: Sequence[int]) -> Fraction:
    """Largest distance between the rows that a source gave and the rows that it should have given, over all n."""
    given_rows = [0] * len(shares)
    largest = Fraction(0)
    for n, source in enumerate(rows, 1):
        given_rows[source] += 1
        for share, count in zip(shares, given_rows, strict=True):
            largest = max(largest, abs(Fraction(share * n, sum(shares)) - count))
    return largest


def most_behind(shares: Sequence[int]) -> list[int]:
    """The rule of several trainers: always the source that lags behind most."""
    total, given_rows, rows = sum(shares), [0] * len(shares), []
    for n in range(1, total + 1):
        behind = [share * n - total * count for share, count in zip(shares, given_rows, strict=True)]
        rows.append(behind.index(max(behind)))
        given_rows[rows[-1]] += 1
    return rows


@given(share_lists)
def test_every_source_is_within_the_bound_after_every_row(shares: list[int]) -> None:
    rows = assignment(shares)
    assert [rows.count(source) for source in range(len(shares))] == shares
    bound = 1 - Fraction(1, 2 * len(shares) - 2) if len(shares) > 1 else 0
    assert largest_deviation(rows, shares) <= bound


def test_the_source_that_lags_most_is_not_enough() -> None:
    shares = [20, 20, 20, 1, 1]
    assert largest_deviation(most_behind(shares), shares) > 1
    assert largest_deviation(assignment(shares), shares) < 1


def test_ten_thousand_rows_of_many_sources() -> None:
    shares = [9951, *[1] * 49]
    assert largest_deviation(assignment(shares)[:300], shares) < 1


def naive_rows(shares: Sequence[int], max_rows: Sequence[int | None], num_rows: int) -> list[tuple[int, int]]:
    """Source and number in the source of each row, one after the other."""
    given_rows, rows, left = [0] * len(shares), [], list(shares)
    turns: list[int] = []
    while any(left) and len(rows) < num_rows:
        if not turns:
            present = [source for source, share in enumerate(left) if share]
            divisor = math.gcd(*left)
            turns = [present[turn] for turn in assignment([left[source] // divisor for source in present])]
        source = turns.pop(0)
        rows.append((source, given_rows[source]))
        given_rows[source] += 1
        if given_rows[source] == max_rows[source]:
            left[source] = 0
            turns = []
    return rows


@given(st.lists(st.tuples(st.integers(1, 12), st.none() | st.integers(1, 60)), min_size=1, max_size=5))
def test_rows_are_those_of_a_simulation(sources: list[tuple[int, int | None]]) -> None:
    shares, max_rows = [share for share, _ in sources], [rows for _, rows in sources]
    mixture = Mixture(shares, max_rows)
    expected = naive_rows(shares, max_rows, 400)
    if None in max_rows:
        assert mixture.total_rows is None
    else:
        assert mixture.total_rows == len(expected) == sum(filter(None, max_rows))
        with pytest.raises(IndexError):
            mixture.locate(len(expected))
        with pytest.raises(IndexError):
            mixture.rows_by_source(len(expected) + 1)
    assert [mixture.locate(row) for row in range(len(expected))] == expected
    for num_rows in range(0, len(expected) + 1, 7):
        counts = [sum(source == each for source, _ in expected[:num_rows]) for each in range(len(shares))]
        assert list(mixture.rows_by_source(num_rows)) == counts


def test_far_rows_are_found_at_once() -> None:
    mixture = Mixture([3, 7], [None, None])
    far = 10**15
    assert mixture.rows_by_source(far) == (3 * 10**14, 7 * 10**14)
    assert {mixture.locate(far + n)[0] for n in range(10)} == {0, 1}
    source, row = mixture.locate(far)
    assert row == mixture.rows_by_source(far)[source]


def test_weights_become_whole_shares() -> None:
    assert integer_weights(["a", "b"], [Fraction("0.7"), Fraction("0.3")]) == (7, 3)
    assert integer_weights(["a", "b", "c"], [Fraction(2), Fraction(4), Fraction(6)]) == (1, 2, 3)
    assert integer_weights(["a"], [Fraction("0.123456789")]) == (1,)


def test_weights_that_repeat_too_late_are_refused_with_the_nearest_ones() -> None:
    weights = [Fraction("0.33333"), Fraction("0.66667")]
    with pytest.raises(InputError, match="a: 3333, b: 6667"):
        integer_weights(["a", "b"], weights)
    assert integer_weights(["a", "b"], [Fraction(share) for share in nearest_shares(weights)]) == (3333, 6667)
    with pytest.raises(InputError, match="weight"):
        integer_weights(["a", "b"], [Fraction(1), Fraction(0)])


@given(st.lists(st.fractions(Fraction(1, 10**6), 10**6), min_size=1, max_size=12))
def test_nearest_shares_fill_a_period(weights: list[Fraction]) -> None:
    shares = nearest_shares(weights)
    assert sum(shares) == MAX_PERIOD
    assert min(shares) >= 1
    total = sum(weights)
    if all(weight / total * MAX_PERIOD >= 1 for weight in weights):
        pairs = zip(shares, weights, strict=True)
        assert all(abs(share - weight / total * MAX_PERIOD) < 1 for share, weight in pairs)
