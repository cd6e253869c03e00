"""All that an experiment's evaluations say: comparisons with their controls, lines, curves and costs. No torch.

Pure but for reading the evaluations. Temperatures are chosen on the tuning split; every number is of the report split.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ebft_mega.apps.experiment.arm_values import (
    CROSS_ENTROPY,
    ArmValues,
    Measure,
    Split,
    are_comparable,
    complete_rows,
    read_main_arms,
)
from ebft_mega.apps.experiment.choosing import MAIN_METRIC, METRICS, best_temperature, edge_notes
from ebft_mega.apps.experiment.comparing import DECLARED_RESAMPLES, OTHER_RESAMPLES, Finding, compare, corrected
from ebft_mega.apps.experiment.fronts import FrontPoint, MatchedDifference, front_point, matched_difference
from ebft_mega.apps.experiment.spec import At, Comparison, ExperimentSpec
from ebft_mega.apps.experiment.trials import ExperimentResults
from ebft_mega.errors import InputError, Problem
from ebft_mega.evaluation.bootstrap import Interval
from ebft_mega.evaluation.conditions import POSITION_BINS, TRAINED_FEATURES
from ebft_mega.evaluation.crossed_interval import CrossedInterval, crossed_interval

Pair = tuple[str, str]
OTHER: dict[At, At] = {"best_temperature": "equal_temperature", "equal_temperature": "best_temperature"}


@dataclass(frozen=True)
class Declared:
    """A comparison that the spec names, and the same one at the other choice of temperatures."""

    finding: Finding
    counterpart: Finding | None  # None for the cross-entropy, which has one temperature


@dataclass(frozen=True)
class ArmSummary:
    """An arm's own figures."""

    arm: str
    seeds: tuple[int, ...]
    temperatures: Mapping[str, float]  # best one for each metric that was measured
    values: Mapping[str, CrossedInterval]  # of each metric at its best temperature
    curve: Mapping[float, CrossedInterval]  # feature-matching loss by temperature
    # The same and the cross-entropy, each mean with the interval of its difference from the first arm at its best
    # temperature: what all arms share, the difficulty of rows and documents, is not in it.
    curve_beside_first: Mapping[float, Interval]
    ce_beside_first: Interval | None


@dataclass(frozen=True)
class ArmCost:
    """What an arm's runs took on average; None where no run says."""

    arm: str
    runs: int  # that say what they took
    steps: float | None
    tokens: float | None
    flops: float | None  # counted
    cpu_seconds: float | None
    wall_seconds: float | None
    tuning_runs: int
    tuning_cpu_seconds: float | None  # of all of them


@dataclass(frozen=True)
class Findings:
    """Everything that a report tells."""

    primary: tuple[Declared, ...]
    secondary: tuple[Declared, ...]
    table: tuple[Finding, ...]  # each arm against the first and the one before it, all metrics, both temperatures
    by_features: tuple[Finding, ...]
    by_length: tuple[Finding, ...]
    by_position: tuple[Finding, ...]
    arms: tuple[ArmSummary, ...]
    fronts: Mapping[str, tuple[FrontPoint, ...]]
    matched: tuple[MatchedDifference, ...]
    costs: tuple[ArmCost, ...]
    notes: tuple[str, ...]
    rows: int
    documents: int | None


@dataclass(frozen=True)
class _Splits:
    """The arms on both splits."""

    spec: ExperimentSpec
    tuning: Mapping[str, ArmValues]
    report: Mapping[str, ArmValues]

    def temperature(self, arm: str, metric: str, at: At, features: str = TRAINED_FEATURES) -> float:
        if metric == CROSS_ENTROPY:
            return 1.0
        if at == "equal_temperature":
            return self.spec.evaluation.equal_temperature
        return best_temperature(self.tuning[arm], self.spec, metric, features)

    def measure(self, arm: str, metric: str, at: At, features: str = TRAINED_FEATURES) -> Measure:
        return Measure(metric, self.temperature(arm, metric, at, features), features=features)

    def compare(self, pair: Pair, metric: str, at: At, num_resamples: int = OTHER_RESAMPLES) -> Finding | None:
        ours, theirs = (self.measure(arm, metric, at) for arm in pair)
        return self.compare_by((ours, theirs), pair, at, num_resamples)

    def compare_by(
        self, measures: tuple[Measure, Measure], pair: Pair, at: At, num_resamples: int = OTHER_RESAMPLES
    ) -> Finding | None:
        arm, against = (self.report[name] for name in pair)
        if not (arm.has(measures[0]) and against.has(measures[1])):
            return None
        return compare(arm, against, measures, at, num_resamples)


def find(spec: ExperimentSpec, results: ExperimentResults) -> Findings:
    """Read all evaluations of an experiment's main runs and compute everything that its report tells.

    Raises:
        InputError: everything that is wrong with the evaluations, at once; a comparison of arms that were not
            evaluated, or that have no seed in common.
    """
    splits = _read(spec, results)
    declared = {
        name: [_declared(splits, each, f"{name}[{place}]") for place, each in enumerate(comparisons)]
        for name, comparisons in (("primary", spec.primary), ("secondary", spec.secondary))
    }
    problems = [each for found in declared.values() for each in found if isinstance(each, Problem)]
    if problems:
        raise InputError(problems)
    primary, secondary = (
        [each for each in declared[name] if isinstance(each, Declared)] for name in ("primary", "secondary")
    )
    holding = corrected([each.finding for each in primary])
    whole = next(iter(splits.report.values()))
    pairs = _control_pairs(splits)
    return Findings(
        primary=tuple(replace(each, finding=finding) for each, finding in zip(primary, holding, strict=True)),
        secondary=tuple(secondary),
        table=tuple(_table(splits)),
        by_features=tuple(_by_features(splits, pairs)),
        by_length=tuple(_by_length(splits, pairs)),
        by_position=tuple(_by_position(splits, pairs)),
        arms=tuple(_summary(splits, arm) for arm in splits.report),
        fronts=_fronts(splits),
        matched=tuple(_matched(splits)),
        costs=tuple(_cost(arm, results) for arm in splits.report),
        notes=tuple(_notes(splits, results)),
        rows=whole.num_rows,
        documents=None if whole.groups is None else len(set(whole.groups)),
    )


def _read(spec: ExperimentSpec, results: ExperimentResults) -> _Splits:
    is_reported = {name for name, arm in spec.arms.items() if arm.reported}
    temperatures = tuple(sorted({*spec.evaluation.temperatures, spec.evaluation.equal_temperature}))
    found: list[dict[str, ArmValues]] = []
    problems: list[Problem] = []
    asked_of: dict[Split, tuple[float, ...]] = {"tuning": spec.evaluation.temperatures, "report": temperatures}
    for split, asked in asked_of.items():
        try:
            found.append(read_main_arms(results.trials, split, asked, is_reported.__contains__))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    tuning, report = found
    order = [name for name in spec.arms if name in report]
    missing = [name for name in order if name not in tuning]
    if not order or missing:
        where, text = (missing[0], "no evaluation on the tuning split") if missing else ("*", "no evaluation")
        raise InputError([Problem("arms", where, text, "evaluations on both splits: run the experiment to its end")])
    return _Splits(spec, tuning, {name: report[name] for name in order})


def _declared(splits: _Splits, comparison: Comparison, key: str) -> Declared | Problem:
    pair = comparison.arm, comparison.against
    lacking = [name for name in pair if name not in splits.report]
    if lacking:
        return Problem("spec", key, f"{lacking[0]!r}, which was not evaluated", ", ".join(splits.report))
    arms = [splits.report[name] for name in pair]
    if not are_comparable(arms):
        seeds = " and ".join(", ".join(map(str, arm.seeds)) or "none" for arm in arms)
        return Problem("spec", key, f"the seeds {seeds}", "arms with a seed in common")
    finding = splits.compare(pair, comparison.metric, comparison.at, DECLARED_RESAMPLES)
    if finding is None:
        path = next(iter(arms[0].by_seed.values())).whole.path
        return Problem(str(path), f"eval/{comparison.metric}", "no figures", f"figures for {key}: evaluate again")
    is_one_temperature = comparison.metric == CROSS_ENTROPY
    other = None if is_one_temperature else splits.compare(pair, comparison.metric, OTHER[comparison.at])
    return Declared(finding, other)


def _table_pairs(splits: _Splits) -> list[Pair]:
    """Each arm against the first one and against the one before it."""
    names = list(splits.report)
    pairs = [(name, names[0]) for name in names[1:]] + [(later, earlier) for earlier, later in pairwise(names)]
    return list(dict.fromkeys(pairs))


def _control_pairs(splits: _Splits) -> list[Pair]:
    """What the spec compares, and each arm against the first one."""
    named = [(each.arm, each.against) for each in (*splits.spec.primary, *splits.spec.secondary)]
    first, *others = splits.report
    return list(dict.fromkeys([*named, *((name, first) for name in others)]))


def _table(splits: _Splits) -> Iterator[Finding]:
    for pair in _table_pairs(splits):
        for metric in METRICS:
            ats: tuple[At, ...] = ("best_temperature", "equal_temperature")
            for at in ats[:1] if metric == CROSS_ENTROPY else ats:
                finding = splits.compare(pair, metric, at)
                if finding is not None:
                    yield finding


def _by_features(splits: _Splits, pairs: Sequence[Pair]) -> Iterator[Finding]:
    """Each arm at its best temperature of that map on the tuning split if it was measured there, else the trained."""
    for features in (TRAINED_FEATURES, *splits.spec.evaluation.feature_maps):
        for pair in pairs:
            ours, theirs = (splits.measure(arm, MAIN_METRIC, "best_temperature", features) for arm in pair)
            finding = splits.compare_by((ours, theirs), pair, "best_temperature")
            if finding is not None:
                yield finding


def _by_length(splits: _Splits, pairs: Sequence[Pair]) -> Iterator[Finding]:
    lengths = {evaluation.completion_length for arm in splits.report.values() for evaluation in arm.by_seed.values()}
    for length in sorted({*lengths, *splits.spec.evaluation.completion_lengths}):
        for pair in pairs:
            ours, theirs = (
                replace(splits.measure(arm, MAIN_METRIC, "best_temperature"), length=length) for arm in pair
            )
            finding = splits.compare_by((ours, theirs), pair, "best_temperature")
            if finding is not None:
                yield finding


def _by_position(splits: _Splits, pairs: Sequence[Pair]) -> Iterator[Finding]:
    for metric in (MAIN_METRIC, CROSS_ENTROPY):
        for pair in pairs:
            for position in range(POSITION_BINS):
                ours, theirs = (
                    replace(splits.measure(arm, metric, "best_temperature"), position=position) for arm in pair
                )
                finding = splits.compare_by((ours, theirs), pair, "best_temperature")
                if finding is not None:
                    yield finding


def _summary(splits: _Splits, name: str) -> ArmSummary:
    arm = splits.report[name]
    measures = {metric: splits.measure(name, metric, "best_temperature") for metric in METRICS}
    measures = {metric: measure for metric, measure in measures.items() if arm.has(measure)}
    values = {metric: _own_interval(arm, measure) for metric, measure in measures.items()}
    curve = {
        temperature: _own_interval(arm, Measure(MAIN_METRIC, temperature))
        for temperature in sorted({*splits.spec.evaluation.temperatures, splits.spec.evaluation.equal_temperature})
    }
    return ArmSummary(
        name,
        arm.seeds,
        {metric: measure.temperature for metric, measure in measures.items()},
        {metric: interval for metric, interval in values.items() if interval is not None},
        {temperature: interval for temperature, interval in curve.items() if interval is not None},
        {
            temperature: _beside_first(splits, interval, Measure(MAIN_METRIC, temperature), name)
            for temperature, interval in curve.items()
            if interval is not None
        },
        _beside_first(splits, ce, measures[CROSS_ENTROPY], name) if (ce := values.get(CROSS_ENTROPY)) else None,
    )


def _beside_first(splits: _Splits, own: CrossedInterval, measure: Measure, name: str) -> Interval:
    """An arm's mean with the interval of its difference from the first arm; without one where they have no seed."""
    first = next(iter(splits.report))
    of_first = splits.measure(first, measure.metric, "best_temperature")
    found = compare(splits.report[name], splits.report[first], (measure, of_first), "best_temperature")
    if found is None:
        return Interval(own.mean, own.mean, own.mean)
    quoted = found.evidence.quoted
    return Interval(own.mean, own.mean + quoted.low - quoted.mean, own.mean + quoted.high - quoted.mean)


def _own_interval(arm: ArmValues, measure: Measure) -> CrossedInterval | None:
    """An arm's own mean; its rows and documents differ far more than the differences of two arms on the same ones."""
    values = arm.values(measure, arm.seeds)
    rows = complete_rows(values)
    if len(rows) < 2:
        return None
    groups = None if arm.groups is None else [arm.groups[row] for row in rows]
    return crossed_interval(values[:, rows], groups, num_resamples=OTHER_RESAMPLES)


def _fronts(splits: _Splits) -> dict[str, tuple[FrontPoint, ...]]:
    fronts = {}
    for name, arms in splits.spec.fronts.items():
        there = [arm for arm in arms if arm in splits.report]
        points = [front_point(splits.report[arm], _fm_temperature(splits, arm)) for arm in there]
        fronts[name] = tuple(sorted((each for each in points if each is not None), key=lambda each: each.ce.mean))
    return fronts


def _matched(splits: _Splits) -> Iterator[MatchedDifference]:
    temperatures = {name: _fm_temperature(splits, name) for name in splits.report}
    for name, arms in splits.spec.fronts.items():
        line = [splits.report[arm] for arm in arms if arm in splits.report]
        for arm in splits.report:
            found = None if arm in arms else matched_difference(name, line, splits.report[arm], temperatures)
            if found is not None:
                yield found


def _fm_temperature(splits: _Splits, arm: str) -> float:
    return splits.temperature(arm, MAIN_METRIC, "best_temperature")


def _cost(arm: str, results: ExperimentResults) -> ArmCost:
    own = [each for each in results.trials if each.trial.arm == arm]
    costs = [each.cost for each in own if each.trial.purpose == "main" and each.cost is not None]
    tuning = [each for each in own if each.trial.purpose == "tuning"]

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known and len(known) == len(values) else None

    tuning_seconds = mean([None if each.cost is None else each.cost.cpu_seconds for each in tuning])
    return ArmCost(
        arm=arm,
        runs=len(costs),
        steps=mean([cost.steps for cost in costs]),
        tokens=mean([cost.tokens for cost in costs]),
        flops=mean([cost.flops for cost in costs]),
        cpu_seconds=mean([cost.cpu_seconds for cost in costs]),
        wall_seconds=mean([cost.wall_seconds for cost in costs]),
        tuning_runs=len(tuning),
        tuning_cpu_seconds=None if tuning_seconds is None else tuning_seconds * len(tuning),
    )


def _notes(splits: _Splits, results: ExperimentResults) -> Iterator[str]:
    """What a reader has to know of single arms."""
    named = [each.metric for each in (*splits.spec.primary, *splits.spec.secondary) if each.at == "best_temperature"]
    for metric in dict.fromkeys([MAIN_METRIC, *named]):
        best = {name: splits.temperature(name, metric, "best_temperature") for name in splits.report}
        yield from edge_notes(splits.spec, results.chosen if metric == MAIN_METRIC else {}, best, metric)
    for name, arm in splits.report.items():
        if len(arm.seeds) == 1:
            yield f"{name}: one seed ({arm.seeds[0]}); nothing about it is shown, because training was not repeated."
        planned = splits.spec.arms[name].seeds or splits.spec.seeds
        if arm.seeds and set(arm.seeds) != set(planned):
            missing = ", ".join(str(seed) for seed in planned if seed not in arm.seeds)
            if missing:
                yield f"{name}: its seeds {missing} are not evaluated."
        for evaluation in arm.by_seed.values():
            if evaluation.whole.left_out:
                place = evaluation.whole.path
                yield f"{name}: {evaluation.whole.left_out} were left out, because something was not finite ({place})."
    names = list(splits.report)
    for name in names[1:]:
        if not are_comparable([splits.report[name], splits.report[names[0]]]):
            yield f"{name}: no seed in common with {names[0]}, so the two are not compared."
