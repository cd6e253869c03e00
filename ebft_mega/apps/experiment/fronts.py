"""The line of cross-entropy and feature matching along a group of arms, and how far other arms lie from it. No torch.

An arm that trades cross-entropy for feature matching is to be compared with what others reach at the same
cross-entropy. Pure: values go in, numbers come out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ebft_mega.apps.experiment.arm_values import (
    CROSS_ENTROPY,
    ArmValues,
    Measure,
    are_comparable,
    common_seeds,
    complete_rows,
)
from ebft_mega.apps.experiment.comparing import OTHER_RESAMPLES, STATISTIC_RESAMPLES, Evidence
from ebft_mega.evaluation.bootstrap import Interval
from ebft_mega.evaluation.crossed_interval import crossed_bootstrap, crossed_interval

FEATURE_MATCHING = "feature_matching_loss"
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class FrontPoint:
    """Where an arm lies, each at its best temperature."""

    arm: str
    temperature: float  # of its completions
    ce: Interval  # over seeds and documents
    fm: Interval


@dataclass(frozen=True)
class MatchedDifference:
    """An arm's feature-matching loss minus that of a line at the arm's cross-entropy."""

    front: str
    arm: str
    ce: float  # of the arm, over the seeds and rows compared
    fm: float
    ends: tuple[float, float]  # cross-entropies at which the line begins and ends
    on_line: float | None  # the line's feature-matching loss there; None outside of its ends
    evidence: Evidence | None  # of the difference; None outside

    @property
    def is_outside(self) -> bool:
        """Whether the arm's cross-entropy is not one that the line reaches."""
        return self.on_line is None


def front_point(arm: ArmValues, temperature: float) -> FrontPoint | None:
    """Where an arm lies, with 95 % intervals over seeds and documents; None without figures.

    Args:
        temperature: of its completions.
    """
    measures = Measure(CROSS_ENTROPY, 1.0), Measure(FEATURE_MATCHING, temperature)
    intervals = []
    for measure in measures:
        values = arm.values(measure, arm.seeds)
        rows = complete_rows(values)
        if len(rows) < 2:
            return None
        groups = None if arm.groups is None else [arm.groups[row] for row in rows]
        intervals.append(crossed_interval(values[:, rows], groups, num_resamples=2).combined)
    return FrontPoint(arm.arm, temperature, *intervals)


def matched_difference(
    name: str, line: Sequence[ArmValues], arm: ArmValues, temperatures: Mapping[str, float]
) -> MatchedDifference | None:
    """Compare an arm with a line at the arm's cross-entropy.

    The line joins the means of its arms, in the order of their cross-entropies, by straight parts. The interval is
    that of the difference's pseudo-values (its own linear form at the arms' means), and a bootstrap of documents and
    seeds in which every draw has a line of its own; beyond its ends a draw's line continues straight.

    Args:
        name: of the line.
        line: its arms.
        arm: none of them.
        temperatures: best for feature matching, by arm.
    Returns:
        None where the arms have no seed in common, fewer than two rows have all figures, or the line has one arm.
    """
    everybody = [*line, arm]
    if len(line) < 2 or not are_comparable(everybody):
        return None
    seeds = common_seeds(everybody)
    ce = [each.values(Measure(CROSS_ENTROPY, 1.0), seeds) for each in everybody]
    fm = [each.values(Measure(FEATURE_MATCHING, temperatures[each.arm]), seeds) for each in everybody]
    rows = complete_rows(*ce, *fm)
    if len(rows) < 2:
        return None
    ces, fms = np.stack(ce)[:, :, rows], np.stack(fm)[:, :, rows]  # [arms, S, R]
    groups = None if arm.groups is None else [arm.groups[row] for row in rows]
    x, y = ces.mean(axis=(1, 2)), fms.mean(axis=(1, 2))
    ends = float(x[:-1].min()), float(x[:-1].max())
    found = float(x[-1]), float(y[-1]), ends
    if not ends[0] <= x[-1] <= ends[1]:
        return MatchedDifference(name, arm.arm, *found, None, None)

    left, right, weight, slope = _part(x[:-1], y[:-1], x[-1])
    on_line = (1.0 - weight) * fms[left] + weight * fms[right]
    same_ce = (1.0 - weight) * ces[left] + weight * ces[right]
    pseudo = fms[-1] - on_line - slope * (ces[-1] - same_ce)

    def difference(drawn: NDArray[np.int64], times: Numbers) -> float:
        share = times / times.sum()
        x, y = (values[:, drawn].mean(axis=1) @ share for values in (ces, fms))
        left, right, weight, _ = _part(x[:-1], y[:-1], x[-1])
        return float(y[-1] - ((1.0 - weight) * y[left] + weight * y[right]))

    num_seeds, num_rows = ces.shape[1:]
    bootstrap = crossed_bootstrap(difference, num_seeds, num_rows, groups, num_resamples=STATISTIC_RESAMPLES)
    interval = crossed_interval(pseudo, groups, num_resamples=OTHER_RESAMPLES)
    evidence = Evidence(interval, bootstrap, seeds)
    return MatchedDifference(name, arm.arm, *found, float(on_line.mean()), evidence)


def _part(x: Numbers, y: Numbers, at: float) -> tuple[int, int, float, float]:
    """The straight part of a line that serves a place: its two points, the right one's weight there, and its slope.

    Args:
        x, y: [N] points in any order, N >= 2.
        at: a place; beyond the ends the nearest part serves.
    """
    order = np.argsort(x, kind="stable")
    place = int(np.clip(np.searchsorted(x[order], at, side="right") - 1, 0, len(x) - 2))
    left, right = int(order[place]), int(order[place + 1])
    width = float(x[right] - x[left])
    if width == 0.0:  # two points above each other: between them
        return left, right, 0.5, 0.0
    return left, right, (at - float(x[left])) / width, float(y[right] - y[left]) / width
