"""Ranges of rows of a run, as `data.skip_rows` names them."""

import bisect
from dataclasses import dataclass


@dataclass(frozen=True)
class RowRanges:
    """Rows of a run, counted from its first row through all sources.

    `pairs`: the first and the last row of every range, both included, in ascending order and without a common row.
    """

    pairs: tuple[tuple[int, int], ...] = ()

    def __contains__(self, number: int) -> bool:
        """Whether a row is in one of the ranges."""
        place = bisect.bisect_right(self.pairs, number, key=lambda pair: pair[0])
        return place > 0 and number <= self.pairs[place - 1][1]

    def count(self, first: int, stop: int) -> int:
        """Count the rows from `first` to before `stop` that are in the ranges."""
        return sum(max(0, min(stop, last + 1) - max(first, start)) for start, last in self.pairs)

    def joined_with(self, first: int, last: int) -> "RowRanges":
        """The same rows and those from `first` to `last`; ranges that touch become one."""
        joined: list[tuple[int, int]] = []
        for start, end in sorted((*self.pairs, (first, last))):
            if joined and start <= joined[-1][1] + 1:
                joined[-1] = joined[-1][0], max(end, joined[-1][1])
            else:
                joined.append((start, end))
        return RowRanges(tuple(joined))

    def __str__(self) -> str:
        """As `--set data.skip_rows=` takes it: without blanks."""
        return f"[{','.join(f'[{first},{last}]' for first, last in self.pairs)}]"
