"""What the arms of an experiment were measured to be: values by seed and row, under any condition. No torch."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ebft_mega.apps.experiment.trials import TrialResult
from ebft_mega.apps.report.condition_evaluations import ConditionEvaluation, read_condition_evaluations
from ebft_mega.errors import InputError, Problem
from ebft_mega.evaluation.conditions import TRAINED_FEATURES, Condition

Numbers = NDArray[np.float64]
Split = Literal["tuning", "report"]
CROSS_ENTROPY = "ce_loss"
CALIBRATION_ERROR = "calibration_error"
OF_TEXT = (CROSS_ENTROPY, "brier", CALIBRATION_ERROR)  # metrics of the text's tokens, without rollouts


@dataclass(frozen=True)
class Measure:
    """One number of a model: which metric, and under which condition."""

    metric: str  # a `MetricName`
    temperature: float  # the cross-entropy is always at 1
    length: int | None = None  # tokens of completions; None is the configuration's own
    features: str = TRAINED_FEATURES
    position: int | None = None  # part of the row, of `POSITION_BINS`; None is the whole row


@dataclass(frozen=True)
class ArmValues:
    """One arm's evaluations on a split, all on the same rows."""

    arm: str
    by_seed: Mapping[int | None, ConditionEvaluation]  # a single one, under None, for a model without seeds

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of its training; none for a model that is evaluated as it is."""
        return tuple(seed for seed in self.by_seed if seed is not None)

    @property
    def groups(self) -> tuple[str, ...] | None:
        """[R], document of each row."""
        return next(iter(self.by_seed.values())).whole.row_groups

    @property
    def num_rows(self) -> int:
        """Rows of the split that were evaluated."""
        return int(next(iter(self.by_seed.values())).whole.content["rows"])

    def of_seed(self, seed: int | None) -> ConditionEvaluation:
        """The evaluation of a seed; that of a model without seeds is the same for all."""
        return self.by_seed[None if None in self.by_seed else seed]

    def values(self, measure: Measure, seeds: Sequence[int]) -> Numbers:
        """Values [S, R] of these seeds, NaN where a row has none; one without seeds is the same for all of them.

        Args:
            seeds: may be empty, for a single row of values, that of a model without seeds.
        """
        if None in self.by_seed:
            return np.repeat(_row_values(self.by_seed[None], measure)[None], max(1, len(seeds)), axis=0)
        return np.stack([_row_values(self.by_seed[seed], measure) for seed in seeds])

    def mean(self, measure: Measure) -> float:
        """Mean over seeds of the means over the rows that have a value; NaN if a seed has none."""
        return float(np.mean(self.seed_means(measure)))

    def seed_means(self, measure: Measure) -> list[float]:
        """Mean of each seed over the rows that have a value; NaN for a seed that has none."""
        rows = [_row_values(evaluation, measure) for evaluation in self.by_seed.values()]
        return [float(np.nanmean(each)) if not np.isnan(each).all() else float("nan") for each in rows]

    def has(self, measure: Measure) -> bool:
        """Whether every one of its evaluations has the measure."""
        try:
            return not any(np.isnan(_row_values(each, measure)).all() for each in self.by_seed.values())
        except InputError:
            return False


def common_seeds(arms: Sequence[ArmValues]) -> tuple[int, ...]:
    """Seeds that all arms have, but for those without any; empty where none has."""
    with_seeds = [arm.seeds for arm in arms if arm.seeds]
    return tuple(seed for seed in with_seeds[0] if all(seed in each for each in with_seeds)) if with_seeds else ()


def are_comparable(arms: Sequence[ArmValues]) -> bool:
    """Whether the arms have a seed in common, or none of them has seeds."""
    return bool(common_seeds(arms)) or not any(arm.seeds for arm in arms)


def complete_rows(*values: Numbers) -> NDArray[np.int64]:
    """Rows for which everything [S, R] has a value."""
    return np.flatnonzero(~np.any([np.isnan(each).any(axis=0) for each in values], axis=0))


def read_main_arms(
    results: Sequence[TrialResult], split: Split, temperatures: Sequence[float], is_wanted: Callable[[str], bool]
) -> dict[str, ArmValues]:
    """Read the evaluations of the main runs on a split, by arm in the order of the trials.

    Args:
        temperatures: that each must have, at the configuration's own completion length and features.
        is_wanted: by name of the arm.
    Raises:
        InputError: everything that is wrong with the files, at once.
    """
    wanted = [each for each in results if each.trial.purpose == "main" and is_wanted(each.trial.arm)]
    paths = {_name(each): path for each in wanted if (path := _directory(each, split)) is not None}
    found = read_condition_evaluations(paths, _of_one_seed(wanted))
    problems: list[Problem] = []
    arms: dict[str, dict[int | None, ConditionEvaluation]] = defaultdict(dict)
    for each in wanted:
        if _name(each) in found:
            evaluation = found[_name(each)]
            problems += missing_conditions(evaluation, temperatures)
            arms[each.trial.arm][each.trial.seed] = evaluation
    if problems:
        raise InputError(problems)
    return {arm: ArmValues(arm, by_seed) for arm, by_seed in arms.items()}


def missing_conditions(evaluation: ConditionEvaluation, temperatures: Sequence[float]) -> list[Problem]:
    """The temperatures that an evaluation lacks, at the configuration's own completion length and features."""
    asked = [Condition(temperature, evaluation.completion_length) for temperature in temperatures]
    return [evaluation.lacks(condition) for condition in asked if condition not in evaluation.conditions]


def _of_one_seed(results: Sequence[TrialResult]) -> list[list[str]]:
    """Names of the runs of each seed, with the models that have none."""
    seeds = dict.fromkeys(each.trial.seed for each in results if each.trial.seed is not None)
    return [[_name(each) for each in results if each.trial.seed in (seed, None)] for seed in seeds or (None,)]


def _name(result: TrialResult) -> str:
    seed = result.trial.seed
    return result.trial.arm if seed is None else f"{result.trial.arm}, seed {seed}"


def _directory(result: TrialResult, split: Split) -> Path | None:
    return result.tuning if split == "tuning" else result.report


def _row_values(evaluation: ConditionEvaluation, measure: Measure) -> Numbers:
    """Values [R] of one evaluation.

    Raises:
        InputError: it was not measured.
    """
    found = _find(evaluation, measure)
    if found is None:
        key = f"eval/{measure.metric}"
        place = "" if measure.position is None else ", by position"
        words = f"values per row at T={measure.temperature:g}{place}: evaluate again (tools/evaluate.py)"
        raise InputError([Problem(str(evaluation.whole.path), key, "nothing", words)])
    return found


def _find(evaluation: ConditionEvaluation, measure: Measure) -> Numbers | None:
    key, position = f"eval/{measure.metric}", measure.position
    if measure.metric == CROSS_ENTROPY:
        if position is None:
            return evaluation.whole.per_row.get(key)
        by_position = evaluation.ce_per_position
        return None if by_position is None else by_position[:, position]
    if measure.metric in OF_TEXT:
        calibration = evaluation.calibration.get(measure.temperature)
        if calibration is None or position is not None:
            return None
        return calibration.error_by_row if measure.metric == CALIBRATION_ERROR else calibration.brier
    figures = evaluation.condition(measure.temperature, measure.length, measure.features)
    if position is None:
        return figures.per_row.get(key)
    found = figures.per_position.get(key)
    return None if found is None else found[:, position]
