"""Bootstrap intervals for the mean of paired differences, by resampling rows or whole groups of rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Resampled indices held at once; 10,000 resamples of a few hundred rows fit.
INDICES_PER_CHUNK = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its interval, in the unit of the values."""

    mean: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 if the whole interval lies on that side of zero, 0 if it does not."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def paired_bootstrap(
    difference: NDArray[np.float64],
    num_resamples: int = 10_000,
    seed: int = 0,
    groups: Sequence[str | int] | None = None,
    confidence: float = 0.95,
) -> Interval:
    """Percentile bootstrap of the mean of per-row differences between two models.

    Rows from one document or package are alike, so an interval over rows alone is too narrow when there are
    few documents; with `groups`, whole groups are drawn with replacement and the mean is taken over the rows of
    the drawn groups (cluster bootstrap).

    Args:
        difference: float [R], value of one model minus value of the other on the same row, R >= 2.
        num_resamples: how often the rows (or groups) are drawn anew.
        seed: of the drawing; the same seed gives the same interval.
        groups: [R], group of each row, with at least two different ones; None draws rows.
        confidence: probability mass between the two ends.
    Returns:
        The mean of `difference` and the ends of its interval.
    Raises:
        ValueError: fewer than two rows or groups, a value that is not finite, or lengths that differ.
    Communication: none.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap, sections 8.3 and 13.3.
    """
    values = np.asarray(difference, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"differences must be a vector, found shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("a difference is not finite")
    sums, counts = _units(values, groups)
    if len(sums) < 2:
        raise ValueError(f"a bootstrap needs at least two rows or groups, found {len(sums)}")
    generator = np.random.default_rng(seed)
    means = np.empty(num_resamples)
    chunk = max(1, INDICES_PER_CHUNK // len(sums))
    for start in range(0, num_resamples, chunk):
        size = min(chunk, num_resamples - start)
        drawn = generator.integers(0, len(sums), size=(size, len(sums)))
        means[start : start + size] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return Interval(float(values.mean()), float(low), float(high))


def _units(
    values: NDArray[np.float64], groups: Sequence[str | int] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and number of rows of each row or group, which are drawn as a whole."""
    if groups is None:
        return values, np.ones_like(values)
    if len(groups) != len(values):
        raise ValueError(f"{len(groups)} groups for {len(values)} rows")
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    counts = np.bincount(member).astype(np.float64)
    return np.bincount(member, weights=values).astype(np.float64), counts
