"""Figures of estimators of one gradient, with intervals: their variance, and whether they have the same mean."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ebft_mega.apps.noise.variance_parts import Array, VarianceParts, Weights, squared_mean, variance_parts

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Figure:
    """A figure of the sample, and the ends of its bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class MeanTest:
    """Whether two estimators have the same mean: what their difference is, and what chance alone gives."""

    chi2_per_df: float  # mean over directions of the squared t value of the rows' differences, about 1 without one
    low: float  # bounds that it lies within in 95 of 100 cases where the means are equal
    high: float
    p_value: float  # share of cases with equal means in which it is at least as large
    squared_difference: Figure  # unbiased, of the means, over the squared mean of the reference

    @property
    def agrees(self) -> bool:
        """Whether it does not exceed what chance alone gives."""
        return self.chi2_per_df <= self.high


class NoiseBootstrap:
    """Projections of several estimators on the same rows and replicates, and the same resamples of all of them."""

    def __init__(self, projections: Array, seed: int = 0, num_resamples: int = NUM_RESAMPLES):
        """Args: projections: [E, X, R, D] of E estimators; `seed`: of the resampling."""
        _, num_rows, _, num_directions = projections.shape
        self.projections = projections
        self.weights = Weights.resampled(num_rows, num_directions, num_resamples, seed)
        self.parts = [variance_parts(of_one) for of_one in projections]
        self.resampled = [variance_parts(of_one, self.weights) for of_one in projections]

    def figure(self, of: Callable[[VarianceParts], Array], estimator: int) -> Figure:
        """A figure of one estimator."""
        return interval(of(self.parts[estimator])[0], of(self.resampled[estimator]))

    def ratio(
        self, of: Callable[[VarianceParts], Array], estimator: int, reference: int, factor: float = 1.0
    ) -> Figure:
        """A figure of one estimator over that of another, both in the same resamples; times a factor."""
        value, drawn = (of(parts[estimator]) / of(parts[reference]) * factor for parts in (self.parts, self.resampled))
        return interval(value[0], drawn)

    def mean_test(self, estimator: int, reference: int) -> MeanTest:
        """Compare the means of two estimators, paired by rows and replicates.

        Where both have the same mean on each row, a row's difference may as well have the other sign. That gives the
        bounds, whatever the distribution is and however alike directions are.
        """
        difference = (self.projections[estimator] - self.projections[reference]).mean(axis=1)  # [X, D]
        found = float(chi2_per_df(difference))
        generator = np.random.default_rng(1)
        flipped = np.array(
            [
                chi2_per_df(difference * generator.choice([-1.0, 1.0], size=(len(difference), 1)))
                for _ in range(len(self.weights.rows))
            ]
        )
        low, high = quantiles(flipped)
        p_value = (1 + int((flipped >= found).sum())) / (1 + len(flipped))
        sizes = [
            squared_mean(difference, weights) / parts[reference].signal
            for weights, parts in (
                (Weights.equal(*difference.shape), self.parts),
                (self.weights, self.resampled),
            )
        ]
        return MeanTest(found, low, high, p_value, interval(sizes[0][0], sizes[1]))


def chi2_per_df(difference: Array) -> Array:
    """Mean over directions of the squared t value of differences [X, D], 1 on average where their mean is 0.

    A squared t value of X rows is (X - 1) / (X - 3) on average, which is divided out. Where all differences are 0 in a
    direction, it counts as 1: nothing speaks against equal means.
    """
    rows = len(difference)
    error = difference.var(axis=0, ddof=1) / rows
    squares = difference.mean(axis=0) ** 2
    correction = (rows - 3) / (rows - 1) if rows > 3 else 1.0
    values = np.where(error > 0, squares / np.where(error > 0, error, 1.0) * correction, 1.0)
    mean: Array = values.mean()
    return mean


def interval(value: float, drawn: Array) -> Figure:
    """A figure with the percentiles of its resamples; where one is undefined it counts as infinite."""
    return Figure(float(value), *quantiles(np.where(np.isnan(drawn), np.inf, drawn)))


def quantiles(drawn: Array) -> tuple[float, float]:
    """The ends of the middle 95 %."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail], method="inverted_cdf")
    return float(low), float(high)
