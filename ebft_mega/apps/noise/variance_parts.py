"""Variance of a gradient within rows of text and between them, from its projections onto directions of random signs.

A *projection* is the inner product of the gradient of one row with a direction of signs. Its variance, averaged over
directions, is the trace of the gradient's covariance; the square of its mean is the squared norm of the mean gradient.
Each row is measured with several *replicates*: other sampling noise, all else equal. Arrays are float64, their axes
row X, replicate R and direction D.

All figures are weighted sums, so that a bootstrap is the same sums with other weights.
"""

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Weights:
    """How often each row and each direction counts, in each of S resamples."""

    rows: Array  # [S, X]
    directions: Array  # [S, D]

    @classmethod
    def equal(cls, num_rows: int, num_directions: int) -> "Weights":
        """Every row and direction once: the sample itself."""
        return cls(np.ones((1, num_rows)), np.ones((1, num_directions)))

    @classmethod
    def resampled(cls, num_rows: int, num_directions: int, num_resamples: int, seed: int) -> "Weights":
        """Rows and directions drawn with replacement, both anew in each resample.

        Intervals are as wide as they should be where rows or directions differ from each other, and too wide where what
        varies is noise of each single entry.
        Source: Owen, "The pigeonhole bootstrap" (Annals of Applied Statistics, 2007).
        """
        generator = np.random.default_rng(seed)
        rows, directions = (
            generator.multinomial(size, np.full(size, 1 / size), size=num_resamples).astype(np.float64)
            for size in (num_rows, num_directions)
        )
        return cls(rows, directions)


@dataclass(frozen=True)
class VarianceParts:
    """Parts of the variance of one row's gradient, of each resample: [S], in units of a squared gradient."""

    within: Array  # over replicates of a row: the sampling of rollouts
    between: Array  # of the rows' expected gradients; unbiased, so it may be below 0
    signal: Array  # squared norm of the mean gradient; unbiased, so it may be below 0

    @property
    def total(self) -> Array:
        """Of one row with one replicate: what a step with one row has."""
        return self.within + self.between

    @property
    def share_between(self) -> Array:
        """Of the total."""
        return self.between / self.total

    @property
    def critical_batch_rows(self) -> Array:
        """Rows whose mean gradient has as much noise as signal: the trace of the covariance over the squared mean.

        Not finite where no signal was found.
        Source: McCandlish et al., "An Empirical Model of Large-Batch Training" (arXiv 1812.06162), the simple noise
        scale.
        """
        with np.errstate(divide="ignore"):
            return np.where(self.signal > 0, self.total / np.where(self.signal > 0, self.signal, 1.0), np.inf)


def variance_parts(projections: Array, weights: Weights | None = None) -> VarianceParts:
    """Take the variance of projections [X, R, D] apart.

    The mean of a row's replicates still has 1/R of the variance within the row, which is taken off the variance between
    rows. Products of means are taken of different rows only, also where a resample has a row twice: all three figures
    are unbiased, in the sample and in every resample.

    Args:
        weights: of rows and directions; None: the sample itself.
    Raises:
        ValueError: fewer than two rows or replicates, or values that are not finite.
    Communication: none.
    """
    num_rows, num_replicates, num_directions = projections.shape
    if num_rows < 2 or num_replicates < 2 or num_directions < 1:
        raise ValueError(f"two rows, two replicates and one direction are needed, found {projections.shape}")
    if not np.isfinite(projections).all():
        raise ValueError("a projection is not finite")
    weights = weights or Weights.equal(num_rows, num_directions)
    means = projections.mean(axis=1)  # [X, D]
    within = _mean(projections.var(axis=1, ddof=1), weights)
    square = _mean(means**2, weights)
    signal = squared_mean(means, weights)
    return VarianceParts(within, square - signal - within / num_replicates, signal)


def squared_mean(values: Array, weights: Weights) -> Array:
    """Square of the mean over rows, averaged over directions, from pairs of different rows: [S].

    Args:
        values: [X, D].
    """
    counts = weights.rows
    pairs = counts.sum(axis=1) ** 2 - (counts**2).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample of one row alone has no pairs
        of_directions = ((counts @ values) ** 2 - counts**2 @ values**2) / pairs[:, None]
    return _over_directions(of_directions, weights)


def joined(parts: list[VarianceParts]) -> VarianceParts:
    """Parts of several estimators, or of chunks of resamples, behind each other."""
    return VarianceParts(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(VarianceParts)))


def _mean(values: Array, weights: Weights) -> Array:
    """Mean of values [X, D] over rows and directions: [S]."""
    return _over_directions(weights.rows @ values / weights.rows.sum(axis=1, keepdims=True), weights)


def _over_directions(values: Array, weights: Weights) -> Array:
    """Mean of values [S, D] over directions."""
    mean: Array = (values * weights.directions).sum(axis=1) / weights.directions.sum(axis=1)
    return mean
