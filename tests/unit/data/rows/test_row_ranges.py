"""Ranges of rows against the same rows as a set."""

from hypothesis import given
from hypothesis import strategies as st

from ebft_mega.data.rows.row_ranges import RowRanges

pairs = st.tuples(st.integers(0, 40), st.integers(0, 8)).map(lambda pair: (pair[0], pair[0] + pair[1]))


def joined(found: list[tuple[int, int]]) -> RowRanges:
    ranges = RowRanges()
    for first, last in found:
        ranges = ranges.joined_with(first, last)
    return ranges


@given(st.lists(pairs, max_size=6), st.integers(0, 50), st.integers(0, 50))
def test_ranges_hold_the_rows_of_all_that_were_joined(found: list[tuple[int, int]], first: int, stop: int) -> None:
    ranges, rows = joined(found), {row for low, high in found for row in range(low, high + 1)}
    assert {row for row in range(60) if row in ranges} == rows
    assert ranges.count(first, stop) == len(rows & set(range(first, stop)))
    ends = [end for pair in ranges.pairs for end in pair]
    assert ends == sorted(ends)
    assert all(after[0] > before[1] + 1 for before, after in zip(ranges.pairs, ranges.pairs[1:], strict=False))


def test_ranges_are_written_as_the_command_line_takes_them() -> None:
    assert str(RowRanges(((0, 15), (160, 319)))) == "[[0,15],[160,319]]"
    assert str(RowRanges()) == "[]"
