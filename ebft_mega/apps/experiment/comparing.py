"""Two arms on one measure: the difference over seeds and documents, and what may be said of it. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ebft_mega.apps.experiment.arm_values import (
    CALIBRATION_ERROR,
    ArmValues,
    Measure,
    are_comparable,
    common_seeds,
    complete_rows,
)
from ebft_mega.apps.experiment.spec import At
from ebft_mega.apps.report.metric_names import metric_named
from ebft_mega.evaluation.bootstrap import Interval
from ebft_mega.evaluation.crossed_interval import CrossedInterval, crossed_bootstrap, crossed_interval
from ebft_mega.evaluation.multiple_comparisons import holm, simultaneous_confidence

Verdict = Literal["shown", "suggested", "not shown"]
LEVEL = 0.05
DECLARED_RESAMPLES = 10_000  # of the comparisons that a spec names
OTHER_RESAMPLES = 2_000  # of the many in tables
STATISTIC_RESAMPLES = 1_000  # of what is no mean of rows


@dataclass(frozen=True)
class Evidence:
    """A mean over seeds and rows with all of its intervals."""

    interval: CrossedInterval
    bootstrap: Interval | None  # of documents and seeds, of what is no mean of rows
    seeds: tuple[int, ...]  # in common; none where both sides are models without seeds

    @property
    def quoted(self) -> Interval:
        """The widest interval, which stands beside the mean wherever it is told."""
        widest = self.interval.widest
        if self.bootstrap is None or self.bootstrap.high - self.bootstrap.low <= widest.high - widest.low:
            return widest
        return replace(self.bootstrap, mean=self.interval.mean)

    @property
    def sign(self) -> int:
        """1 or -1 only if every interval of documents lies on that side of zero, else 0."""
        sign = self.interval.sign
        return sign if self.bootstrap is None or self.bootstrap.sign == sign else 0

    def verdict(self, corrected_p: float | None = None) -> Verdict:
        """What may be said of a direction.

        A direction is shown if every interval leaves out zero, training was repeated, and the correction, where there
        is one, holds; it is suggested if the intervals alone do.

        Args:
            corrected_p: for the number of comparisons that it was named among.
        """
        if not self.sign:
            return "not shown"
        is_repeated = len(self.seeds) != 1
        return "shown" if is_repeated and (corrected_p is None or corrected_p < LEVEL) else "suggested"


@dataclass(frozen=True)
class Finding:
    """The difference of two arms, `arm` minus `against`, on one measure."""

    arm: str
    against: str
    metric: str
    at: At
    measures: tuple[Measure, Measure]  # of the two arms; they differ in the temperature alone
    values: tuple[float, float]  # mean of each arm over the seeds and rows compared
    evidence: Evidence
    corrected_p: float | None = None  # Holm's
    simultaneous: Interval | None = None  # such that those of all primary comparisons hold at once

    @property
    def verdict(self) -> Verdict:
        """What may be said of its direction."""
        return self.evidence.verdict(self.corrected_p)

    @property
    def direction(self) -> str:
        """`lower` or `higher`, as the mean is, whether that is shown or not."""
        return "lower" if self.evidence.interval.mean < 0 else "higher"

    @property
    def is_better(self) -> bool | None:
        """Whether the mean's direction is the metric's better one; None for a metric without."""
        better = metric_named(self.metric).direction
        return None if better not in ("lower", "higher") else better == self.direction


def compare(
    arm: ArmValues, against: ArmValues, measures: tuple[Measure, Measure], at: At, num_resamples: int = OTHER_RESAMPLES
) -> Finding | None:
    """Compare two arms, seed by seed and row by row.

    Args:
        measures: what of `arm` and what of `against`.
        num_resamples: of the bootstraps.
    Returns:
        The difference over the seeds in common and the rows that all have; None without a common seed or two rows.
    Raises:
        InputError: an evaluation lacks a measure.
    """
    if not are_comparable((arm, against)):
        return None
    seeds = common_seeds((arm, against))
    values = [side.values(measure, seeds) for side, measure in zip((arm, against), measures, strict=True)]
    rows = complete_rows(*values)
    if len(rows) < 2:
        return None
    ours, theirs = (each[:, rows] for each in values)
    groups = None if arm.groups is None else [arm.groups[row] for row in rows]
    interval = crossed_interval(ours - theirs, groups, num_resamples=num_resamples)
    bootstrap = None
    if measures[0].metric == CALIBRATION_ERROR:
        number = min(num_resamples, STATISTIC_RESAMPLES)
        bootstrap = _calibration_bootstrap((arm, against), measures, seeds, number)
    evidence = Evidence(interval, bootstrap, seeds)
    means = float(ours.mean()), float(theirs.mean())
    return Finding(arm.arm, against.arm, measures[0].metric, at, measures, means, evidence)


def corrected(findings: Sequence[Finding]) -> list[Finding]:
    """Give the comparisons that were named beforehand their corrected p (Holm) and simultaneous intervals (Bonferroni).

    Args:
        findings: all of them, and no others.
    """
    if not findings:
        return []
    confidence = simultaneous_confidence(len(findings), 1.0 - LEVEL)
    p_values = holm([finding.evidence.interval.p for finding in findings])
    return [
        replace(finding, corrected_p=p, simultaneous=finding.evidence.interval.at(confidence))
        for finding, p in zip(findings, p_values, strict=True)
    ]


def _calibration_bootstrap(
    arms: tuple[ArmValues, ArmValues], measures: tuple[Measure, Measure], seeds: Sequence[int], num_resamples: int
) -> Interval:
    """Interval of the difference of two calibration errors, each of all drawn rows together, mean over seeds."""
    gaps, tokens = [], []
    for arm, measure in zip(arms, measures, strict=True):
        found = [arm.of_seed(seed).calibration[measure.temperature] for seed in seeds or (None,)]
        gaps.append(np.stack([each.confidence - each.correct for each in found]))
        tokens.append(np.stack([each.tokens.sum(axis=1) for each in found]))

    def difference(drawn: NDArray[np.int64], times: NDArray[np.float64]) -> float:
        ours, theirs = (
            abs(times @ gap).sum(axis=-1) / (number @ times) for gap, number in zip(gaps, tokens, strict=True)
        )
        return float((ours - theirs)[drawn].mean())

    groups = arms[0].groups
    num_seeds, num_rows = tokens[0].shape
    return crossed_bootstrap(difference, num_seeds, num_rows, groups, num_resamples=num_resamples)
