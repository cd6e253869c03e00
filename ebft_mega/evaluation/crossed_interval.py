"""The mean of a difference that is known for several training seeds on the same held-out rows, with its uncertainty.

Two things are drawn at random: the seeds of training, and the documents. Each seed is evaluated on every document, so
the two are crossed, and both belong into the interval of a claim that is to hold for other seeds and other documents.
Per-row metrics need no more than this; what is not a mean of rows (a calibration error, a distance from a line) comes
here by its pseudo-values, and by `crossed_bootstrap`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ebft_mega.evaluation.bootstrap import Interval, paired_bootstrap
from ebft_mega.evaluation.student_t import t_quantile, two_sided_p


@dataclass(frozen=True)
class CrossedInterval:
    """A mean over seeds and rows, and how far it may be off, by what is drawn anew."""

    by_rows: Interval  # bootstrap of rows
    by_documents: Interval | None  # bootstrap of documents; None without at least two
    by_seeds: Interval | None  # Student's t of the seeds' means; None for one seed
    combined: Interval  # documents and seeds
    standard_error: float  # of the combined interval
    degrees_of_freedom: float  # of the combined interval
    p: float  # two-sided, from the combined interval's standard error
    seed_means: tuple[float, ...]  # [S]
    rows: int
    documents: int  # rows where rows have no documents

    @property
    def mean(self) -> float:
        """Mean over seeds and rows."""
        return self.combined.mean

    @property
    def widest(self) -> Interval:
        """The interval that is quoted: the widest of rows, documents, and documents and seeds together.

        That of the seeds alone is no rival: with two seeds it is wide because the spread of two is hardly known, which
        the degrees of freedom of the combined one say as far as seeds matter.
        """
        intervals = [self.combined, *(each for each in (self.by_documents, self.by_rows) if each is not None)]
        return max(intervals, key=lambda interval: interval.high - interval.low)

    @property
    def sign(self) -> int:
        """1 or -1 only if the combined interval and those by rows and by documents lie on that side of zero, else 0."""
        signs = {each.sign for each in (self.combined, self.by_rows, self.by_documents) if each is not None}
        return signs.pop() if len(signs) == 1 else 0

    def at(self, confidence: float) -> Interval:
        """The combined interval at another confidence, such as that of simultaneous intervals."""
        half = t_quantile(confidence, self.degrees_of_freedom) * self.standard_error
        return Interval(self.mean, self.mean - half, self.mean + half)


def crossed_interval(
    values: NDArray[np.float64],
    groups: Sequence[str | int] | None = None,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> CrossedInterval:
    """Compute the mean of differences that are known for every seed and row, and its intervals.

    The variance of the mean is V = V_seeds + V_documents - V_both: the spread of the seeds' means, the spread of the
    documents' sums, and the spread of what is left without the two, which both of them contain. V is at least the
    larger of the first two. Satterthwaite's degrees of freedom follow from those of the three, at least the smaller of
    S - 1 and G - 1. Where neither seeds nor documents have an effect of their own, the interval is wider than it says.

    Args:
        values: float [S, R], one seed's difference on a row; the two sides of a difference have the same seed. S = 1
            for what has no seeds, whose interval is then over documents alone.
        groups: [R], document of each row; None takes each row for a document of its own.
        confidence: probability mass of each interval.
        num_resamples, seed: of the bootstrap.
    Raises:
        ValueError: fewer than two rows, no seed, or a value that is not finite.
    Communication: none.
    Source: Cameron, Gelbach and Miller, Robust Inference With Multiway Clustering (2011); the degrees of freedom,
        Satterthwaite, An Approximate Distribution of Estimates of Variance Components (1946).
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] < 1 or values.shape[1] < 2:
        raise ValueError(f"differences must be [seeds, rows] with at least two rows, found shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("a difference is not finite")
    by_row_of_seeds, seed_means = values.mean(axis=0), values.mean(axis=1)
    has_documents = groups is not None and len(set(groups)) > 1
    variance, degrees = _variance(values, _members(groups if has_documents else None, values.shape[1]))
    mean, error = float(values.mean()), float(np.sqrt(variance))
    half = t_quantile(confidence, degrees) * error
    by_documents = None
    if has_documents:
        by_documents = paired_bootstrap(by_row_of_seeds, num_resamples, seed, groups, confidence)
    return CrossedInterval(
        by_rows=paired_bootstrap(by_row_of_seeds, num_resamples, seed, None, confidence),
        by_documents=by_documents,
        by_seeds=_by_seeds(seed_means, confidence),
        combined=Interval(mean, mean - half, mean + half),
        standard_error=error,
        degrees_of_freedom=degrees,
        p=_p(mean, error, degrees),
        seed_means=tuple(seed_means.tolist()),
        rows=values.shape[1],
        documents=len(set(groups)) if groups is not None else values.shape[1],
    )


def crossed_bootstrap(
    statistic: Callable[[NDArray[np.int64], NDArray[np.float64]], float],
    num_seeds: int,
    num_rows: int,
    groups: Sequence[str | int] | None = None,
    confidence: float = 0.95,
    num_resamples: int = 1_000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of any statistic, with seeds and documents drawn independently of each other.

    With few seeds it is too narrow (two seeds drawn from two are one seed half of the time); the interval of
    pseudo-values with Student's t stands beside it.

    Args:
        statistic: takes the drawn seeds, int64 [S], and how often each row was drawn, float64 [R]; returns a number.
        num_seeds, num_rows: S and R.
        groups: [R], document of each row; None draws rows.
        num_resamples, seed: of the drawing.
    Returns:
        The statistic of what is there, and the ends of its interval.
    Source: Owen, The pigeonhole bootstrap (Annals of Applied Statistics, 2007).
    """
    member = _members(groups, num_rows)
    num_groups = int(member.max()) + 1
    generator = np.random.default_rng(seed)
    found = np.empty(num_resamples)
    for draw in range(num_resamples):
        seeds = generator.integers(0, num_seeds, size=num_seeds)
        times = np.bincount(generator.integers(0, num_groups, size=num_groups), minlength=num_groups)
        found[draw] = statistic(seeds, times[member].astype(np.float64))
    tail = (1.0 - confidence) / 2.0
    low, high = np.nanquantile(found, [tail, 1.0 - tail])
    whole = statistic(np.arange(num_seeds), np.ones(num_rows))
    return Interval(float(whole), float(low), float(high))


def _members(groups: Sequence[str | int] | None, num_rows: int) -> NDArray[np.int64]:
    """Number of each row's document, [R]; each row is one where there are none."""
    if groups is None:
        return np.arange(num_rows)
    if len(groups) != num_rows:
        raise ValueError(f"{len(groups)} groups for {num_rows} rows")
    return np.asarray(np.unique(np.asarray(groups), return_inverse=True)[1], dtype=np.int64)


def _by_seeds(means: NDArray[np.float64], confidence: float) -> Interval | None:
    if len(means) < 2:
        return None
    mean = float(means.mean())
    half = t_quantile(confidence, len(means) - 1) * float(means.std(ddof=1)) / len(means) ** 0.5
    return Interval(mean, mean - half, mean + half)


def _variance(values: NDArray[np.float64], member: NDArray[np.int64]) -> tuple[float, float]:
    """Variance of the mean over seeds and documents, and its degrees of freedom."""
    num_seeds, num_rows = values.shape
    num_documents = int(member.max()) + 1
    mean, by_seed, by_row = values.mean(), values.mean(axis=1, keepdims=True), values.mean(axis=0)

    def between_documents(rows: NDArray[np.float64]) -> float:
        sums = np.bincount(member, weights=rows, minlength=num_documents)
        return float((sums**2).sum()) / num_rows**2 * num_documents / (num_documents - 1)

    documents = between_documents(by_row - mean)
    if num_seeds == 1:
        return documents, float(num_documents - 1)
    seeds = float(by_seed.var(ddof=1)) / num_seeds
    rest = values - by_seed - by_row + mean
    both = sum(between_documents(rows) for rows in rest) / (num_seeds * (num_seeds - 1))
    variance = max(seeds + documents - both, seeds, documents)
    parts = ((seeds, num_seeds - 1), (documents, num_documents - 1), (both, (num_seeds - 1) * (num_documents - 1)))
    least = float(min(num_seeds, num_documents) - 1)
    if variance == 0.0:
        return 0.0, least
    # Relative to the whole, because squares of small variances would vanish.
    degrees = 1.0 / sum((part / variance) ** 2 / freedom for part, freedom in parts)
    return variance, max(degrees, least)


def _p(mean: float, error: float, degrees: float) -> float:
    if error == 0.0:
        return 1.0 if mean == 0.0 else 0.0
    return two_sided_p(mean / error, degrees)
