"""Mix sources by weight: which source row n of the run comes from, and which of its rows that is.

Weights are exact fractions. The rows are assigned by the rule of R. Tijdeman, "The chairman assignment problem"
(Discrete Mathematics 32, 1980): row by row, of all sources that have earned their next row it takes the one whose row
is due first. Of the first n rows, source s then gives w_s * n to within 1 - 1 / (2S - 2), S being the number of
sources, for every n and every s. Taking the source that lags behind most does not promise that.

Weights over a common denominator D repeat the same sequence every D rows, so one period decides all rows. A source
that has given all the rows it may give ends, and from there the others continue with their weights in proportion.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from ebft_mega.io.input_errors import bad_input

MAX_PERIOD = 10_000  # rows


def integer_weights(names: Sequence[str], weights: Sequence[Fraction]) -> tuple[int, ...]:
    """Weights as whole shares of a period.

    Args:
        names: of the sources, for messages.
        weights: of the sources, in any proportion.

    Returns:
        Rows of each source in a period, without a common divisor; their sum is the period D.

    Raises:
        InputError: a weight is not positive, or D is above `MAX_PERIOD`.
    """
    for name, weight in zip(names, weights, strict=True):
        if weight <= 0:
            raise bad_input(name, "weight", weight, "a weight above 0")
    denominator = math.lcm(*(weight.denominator for weight in weights))
    shares = [int(weight * denominator) for weight in weights]
    divisor = math.gcd(*shares)
    shares = [share // divisor for share in shares]
    if sum(shares) > MAX_PERIOD:
        listed = ", ".join(f"{name}: {weight}" for name, weight in zip(names, weights, strict=True))
        nearest = ", ".join(f"{name}: {share}" for name, share in zip(names, nearest_shares(weights), strict=True))
        expected = f"weights that repeat within {MAX_PERIOD} rows, such as {nearest}"
        raise bad_input(
            "weights of the sources", "weight", f"{listed}, which repeat every {sum(shares)} rows", expected
        )
    return tuple(shares)


def nearest_shares(weights: Sequence[Fraction]) -> list[int]:
    """Whole shares of `MAX_PERIOD` rows that come nearest to weights, each at least 1; they sum to `MAX_PERIOD`."""
    total = sum(weights)
    exact = [weight / total * MAX_PERIOD for weight in weights]
    shares = [max(1, math.floor(share)) for share in exact]
    while sum(shares) != MAX_PERIOD:
        step = 1 if sum(shares) < MAX_PERIOD else -1
        movable = [source for source, share in enumerate(shares) if share + step >= 1]
        best = min(movable, key=lambda source: step * (shares[source] - exact[source]))
        shares[best] += step
    return shares


def assignment(shares: Sequence[int]) -> list[int]:
    """Which source gives each row of a period.

    Args:
        shares: rows of each source in a period, each at least 1.

    Returns:
        Source of each row, sum(shares) of them.
    """
    period, slack = sum(shares), max(2 * len(shares) - 2, 1)

    def earned(source: int, rows: int) -> int:
        """First n, counted from 1, at which a source that has given `rows` rows may give another one."""
        return -(-period * (slack * rows + 1) // (shares[source] * slack)) if len(shares) > 1 else rows + 1

    def due(source: int, rows: int) -> int:
        """Last n at which it must: without it, it would lag more than 1 - 1 / slack behind at this n."""
        return period * (slack * (rows + 1) - 1) // (shares[source] * slack) + 1

    waiting = [(earned(source, 0), source, 0) for source in range(len(shares))]
    heapq.heapify(waiting)
    ready: list[tuple[int, int, int]] = []
    rows = []
    for n in range(1, period + 1):
        while waiting and waiting[0][0] <= n:
            _, source, given = heapq.heappop(waiting)
            heapq.heappush(ready, (due(source, given), source, given))
        _, source, given = heapq.heappop(ready)
        rows.append(source)
        if given + 1 < shares[source]:
            heapq.heappush(waiting, (earned(source, given + 1), source, given + 1))
    return rows


@dataclass(frozen=True)
class _Segment:
    """The rows from one source's end to the next one's, in which the same sources take turns."""

    first_row: int
    given: tuple[int, ...]  # rows of every source before this segment
    shares: tuple[int, ...]  # of every source in a period; 0: it has ended
    sources: np.ndarray  # int64 [period], which source gives each row
    ranks: np.ndarray  # int64 [period], how many rows the same source gave before in the period
    places: tuple[np.ndarray, ...]  # of every source: int64 [share], where its rows stand in the period


class Mixture:
    """The rows of several sources in the order of the run; any row can be found at any time.

    Args:
        shares: rows of each source in a period, from `integer_weights`.
        max_rows: rows that each source gives in the whole run, at least 1; None: endless.
    """

    def __init__(self, shares: Sequence[int], max_rows: Sequence[int | None]):
        if any(rows is not None and rows < 1 for rows in max_rows):
            raise ValueError(f"max_rows {max_rows}")
        self._segments: list[_Segment] = []
        self.total_rows: int | None = None  # None: endless
        first_row, given = 0, [0] * len(shares)
        left = list(shares)
        while any(left):
            segment = _make_segment(first_row, given, left)
            self._segments.append(segment)
            ends = [
                (_row_of(segment, source, rows - 1) + 1, source)
                for source, rows in enumerate(max_rows)
                if left[source] and rows is not None
            ]
            if not ends:
                return
            first_row, ended = min(ends)
            given = list(self._rows_in(segment, first_row))
            left[ended] = 0
        self.total_rows = first_row

    def locate(self, row: int) -> tuple[int, int]:
        """The source of a row of the run, and the number of the row in that source.

        Raises:
            IndexError: there is no such row.
        """
        if row < 0 or (self.total_rows is not None and row >= self.total_rows):
            raise IndexError(f"row {row} of {self.total_rows}")
        segment = self._segment_of(row)
        periods, place = divmod(row - segment.first_row, len(segment.sources))
        source = int(segment.sources[place])
        return source, segment.given[source] + periods * segment.shares[source] + int(segment.ranks[place])

    def rows_by_source(self, num_rows: int) -> tuple[int, ...]:
        """How many of the first rows of the run each source gives.

        Raises:
            IndexError: there are fewer rows.
        """
        if num_rows < 0 or (self.total_rows is not None and num_rows > self.total_rows):
            raise IndexError(f"{num_rows} rows of {self.total_rows}")
        return self._rows_in(self._segment_of(num_rows), num_rows)

    def _segment_of(self, row: int) -> _Segment:
        return next(segment for segment in reversed(self._segments) if segment.first_row <= row)

    def _rows_in(self, segment: _Segment, num_rows: int) -> tuple[int, ...]:
        periods, place = divmod(num_rows - segment.first_row, len(segment.sources))
        return tuple(
            before + periods * share + int(np.searchsorted(places, place))
            for before, share, places in zip(segment.given, segment.shares, segment.places, strict=True)
        )


def _make_segment(first_row: int, given: Sequence[int], left: Sequence[int]) -> _Segment:
    divisor = math.gcd(*left)
    shares = tuple(share // divisor for share in left)
    present = [source for source, share in enumerate(shares) if share]
    sources = np.array(present)[assignment([shares[source] for source in present])]
    places = tuple(np.flatnonzero(sources == source) for source in range(len(shares)))
    ranks = np.empty(len(sources), np.int64)
    for where in places:
        ranks[where] = np.arange(len(where))
    return _Segment(first_row, tuple(given), shares, sources, ranks, places)


def _row_of(segment: _Segment, source: int, number: int) -> int:
    """The row of the run that is row `number` of a source, one that comes in this segment or after it."""
    periods, rank = divmod(number - segment.given[source], segment.shares[source])
    return segment.first_row + periods * len(segment.sources) + int(segment.places[source][rank])
