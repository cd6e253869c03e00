"""Choose each arm's values and each arm's best temperature, on the tuning split alone. No torch."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import get_args

import numpy as np

from ebft_mega.apps.experiment.arm_values import CROSS_ENTROPY, ArmValues, Measure, missing_conditions, read_main_arms
from ebft_mega.apps.experiment.spec import ExperimentSpec, MetricName
from ebft_mega.apps.experiment.trials import Choice, ExperimentResults, Trial
from ebft_mega.apps.report.condition_evaluations import ConditionEvaluation, read_condition_evaluations
from ebft_mega.apps.report.metric_names import metric_named
from ebft_mega.errors import InputError, Problem
from ebft_mega.evaluation.conditions import TRAINED_FEATURES

METRICS: tuple[str, ...] = get_args(MetricName)
# What has no better direction is compared at the temperature that is best for this.
MAIN_METRIC = "feature_matching_loss"


def choose(spec: ExperimentSpec, results: ExperimentResults) -> dict[str, Choice]:
    """Choose the values of each tuned arm by its runs on the tuning split.

    A run counts by its metric at its own best temperature, values by their mean over the tuning seeds. Of equal ones
    the first are chosen.

    Args:
        results: with the trials of the tuning of some arms.
    Returns:
        The choice of every arm that has such trials, as its trials state it.
    Raises:
        InputError: everything that is wrong with the evaluations, at once; an arm none of whose values was run with
            every seed; a metric without a better direction.
    """
    chosen, problems = {}, []
    for arm, tried in tuning_means(spec, results).items():
        known = [(choice, value) for choice, value in tried if math.isfinite(value)]
        if known:
            chosen[arm] = min(known, key=lambda each: each[1])[0]
        else:
            seeds = ", ".join(map(str, spec.tuning.seeds))
            problems.append(Problem(f"arms.{arm}", "tune", "no evaluated values", f"runs with the seeds {seeds}"))
    if problems:
        raise InputError(problems)
    return chosen


def tuning_means(spec: ExperimentSpec, results: ExperimentResults) -> dict[str, list[tuple[Choice, float]]]:
    """Compute what each of the values tried is chosen by: the lower, the better (a metric's negative where higher is).

    Returns:
        By arm, each choice with its mean over the tuning seeds; infinity where a seed has no figure.
    Raises:
        InputError: as for `choose`.
    """
    metric = spec.tuning.metric
    direction = metric_named(metric).direction
    if direction not in ("lower", "higher"):
        expected = "a metric of which lower or higher is better"
        raise InputError([Problem("tuning", "metric", metric, expected)])
    evaluated = [each for each in results.trials if each.trial.purpose == "tuning" and each.tuning is not None]
    found = read_condition_evaluations(
        {_name(each.trial): each.tuning for each in evaluated if each.tuning is not None},
        [
            [_name(each.trial) for each in evaluated if each.trial.seed == seed]
            for seed in dict.fromkeys(each.trial.seed for each in evaluated)
        ],
    )
    temperatures = _sorted_temperatures(spec)
    if problems := [problem for each in found.values() for problem in missing_conditions(each, temperatures)]:
        raise InputError(problems)
    # A choice may hold lists, which are no keys: it stands for itself as a text.
    choices: dict[str, dict[str, Choice]] = defaultdict(dict)
    values: dict[tuple[str, str, int | None], float] = defaultdict(lambda: math.inf)
    for trial in (each.trial for each in results.trials if each.trial.purpose == "tuning"):
        choices[trial.arm][repr(trial.choice)] = trial.choice
        if _name(trial) in found:
            key = (trial.arm, repr(trial.choice), trial.seed)
            values[key] = _best_value(found[_name(trial)], metric, direction, temperatures)
    return {
        arm: [
            (choice, float(np.mean([values[arm, text, seed] for seed in spec.tuning.seeds])))
            for text, choice in of_arm.items()
        ]
        for arm, of_arm in choices.items()
    }


def best_temperatures(
    spec: ExperimentSpec, results: ExperimentResults, metric: str = MAIN_METRIC, features: str = TRAINED_FEATURES
) -> dict[str, float]:
    """Choose each arm's best temperature for a metric: one, from the mean over its seeds on the tuning split.

    Of equal ones the lower. A metric without a better direction takes the temperature of the feature-matching loss;
    the cross-entropy is at temperature 1 always.

    Args:
        results: with the main trials, evaluated on the tuning split.
        features: feature map that the metric is taken with.
    Raises:
        InputError: everything that is wrong with the evaluations, at once.
    """
    arms = read_main_arms(results.trials, "tuning", spec.evaluation.temperatures, lambda _: True)
    return {name: best_temperature(arm, spec, metric, features) for name, arm in arms.items()}


def best_temperature(
    arm: ArmValues, spec: ExperimentSpec, metric: str = MAIN_METRIC, features: str = TRAINED_FEATURES
) -> float:
    """Choose one arm's best temperature; see `best_temperatures`.

    Args:
        arm: its values on the tuning split.
        features: where the tuning split lacks this map, the temperature is that of the trained one.
    """
    if metric == CROSS_ENTROPY:
        return 1.0
    direction = metric_named(metric).direction
    if direction not in ("lower", "higher"):
        metric, direction = MAIN_METRIC, metric_named(MAIN_METRIC).direction
    temperatures = _sorted_temperatures(spec)
    measures = [Measure(metric, temperature, features=features) for temperature in temperatures]
    if not all(arm.has(measure) for measure in measures):
        measures = [Measure(metric, temperature) for temperature in temperatures]
    values = [_signed(arm.mean(measure), direction) for measure in measures]
    return temperatures[int(np.argmin(values))]


def edge_notes(
    spec: ExperimentSpec, chosen: Mapping[str, Choice], best: Mapping[str, float], metric: str = MAIN_METRIC
) -> list[str]:
    """Say where what was chosen is the smallest or the largest that was tried: a better one may lie beyond.

    Args:
        chosen: by arm, as `choose` returns it.
        best: temperatures of the metric, as `best_temperatures` returns them.
    """
    notes = []
    for arm, choice in chosen.items():
        tried = spec.arms[arm].tune if arm in spec.arms else {}
        for key, value in choice:
            numbers = [each for each in tried.get(key, ()) if isinstance(each, int | float)]
            if len(set(numbers)) > 1 and value in (min(numbers), max(numbers)):
                end = "smallest" if value == min(numbers) else "largest"
                notes.append(f"{arm}: {key} = {value} is at the edge of what was tried, the {end} of {_list(numbers)}.")
    tried_temperatures = _sorted_temperatures(spec)
    has_own = metric != CROSS_ENTROPY and metric_named(metric).direction in ("lower", "higher")
    if has_own and len(tried_temperatures) > 1:
        for arm, temperature in best.items():
            if temperature in (tried_temperatures[0], tried_temperatures[-1]):
                label, there = metric_named(metric).label, _list(tried_temperatures)
                notes.append(
                    f"{arm}: its best temperature for {label}, {temperature:g}, is at the edge of what was tried: "
                    f"{there}."
                )
    return notes


def _best_value(evaluation: ConditionEvaluation, metric: str, direction: str, temperatures: Sequence[float]) -> float:
    """A run's metric at its best temperature, the lower the better; infinity without a figure."""
    run = ArmValues("", {None: evaluation})
    return min(_signed(run.mean(Measure(metric, temperature)), direction) for temperature in temperatures)


def _signed(value: float, direction: str) -> float:
    if math.isnan(value):
        return math.inf
    return value if direction == "lower" else -value


def _sorted_temperatures(spec: ExperimentSpec) -> list[float]:
    return sorted(set(spec.evaluation.temperatures))


def _list(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in sorted(numbers))


def _name(trial: Trial) -> str:
    values = ", ".join(f"{key} = {value}" for key, value in trial.choice)
    return f"{trial.arm} with {values}, seed {trial.seed}"
