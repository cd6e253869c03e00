"""Read `evaluation.json` files with conditions (`evaluation/conditions.py`), and check that their rows are pairs."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebft_mega.apps.report.evaluations import SHARED_FIELDS, Evaluation, pairing_problems, read_evaluation
from ebft_mega.errors import InputError, Problem
from ebft_mega.evaluation.conditions import CONFIDENCE_BINS, POSITION_BINS, TRAINED_FEATURES, Condition
from ebft_mega.io.parse_boundary import reading

Numbers = NDArray[np.float64]
WRITTEN_BY = "what tools/evaluate.py has written"
# Of all evaluations that are compared: of `SHARED_FIELDS` all but the temperature, as each condition has its own, and
# the feature network.
PAIRED_FIELDS = {
    key: advice for key, advice in SHARED_FIELDS.items() if key not in ("temperature", "feature_model")
} | {
    "sequence_length": "give the same --config to both",
}
# Of evaluations of the same seed: where seeds have warm starts of their own, these give the features.
FEATURE_FIELDS = {
    "feature_model": SHARED_FIELDS["feature_model"],
    "feature_maps": "give the same --config and feature maps to both",
}
BINS = {"tokens": "eval/bin_tokens", "confidence": "eval/bin_confidence", "correct": "eval/bin_correct"}


@dataclass(frozen=True)
class ConditionFigures:
    """Metrics of rollouts under one condition, by key; NaN where a row has none."""

    per_row: Mapping[str, Numbers]  # [R]
    per_position: Mapping[str, Numbers]  # [R, POSITION_BINS]


@dataclass(frozen=True)
class CalibrationFigures:
    """How far next-token probabilities at one temperature can be believed; NaN or no tokens where a row has none."""

    brier: Numbers  # [R]
    tokens: Numbers  # [R, CONFIDENCE_BINS]
    confidence: Numbers  # [R, CONFIDENCE_BINS], sums over tokens
    correct: Numbers  # [R, CONFIDENCE_BINS], tokens

    @property
    def error_by_row(self) -> Numbers:
        """Pseudo-values [R] of the expected calibration error, whose mean it is; NaN for rows without tokens.

        The error is taken of all rows together: it is no mean of rows. A row's pseudo-value says how the whole would
        change with the row's weight, at fixed signs of the bins.

        Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 21 (the delta method by influences).
        """
        has_tokens = self.tokens.sum(axis=1) > 0
        gaps = self.confidence - self.correct
        signs, number = np.sign(gaps.sum(axis=0)), self.tokens.sum()
        if not number:
            return np.full(len(gaps), np.nan)
        error = abs(gaps.sum(axis=0)).sum() / number
        influence = has_tokens.sum() / number * (gaps @ signs - error * self.tokens.sum(axis=1))
        return np.where(has_tokens, error + influence, np.nan)

    def error_of(self, times: Numbers) -> float:
        """The expected calibration error of rows taken so many times each [R]; NaN without tokens."""
        number = float(times @ self.tokens.sum(axis=1))
        return float(abs(times @ (self.confidence - self.correct)).sum()) / number if number else float("nan")


@dataclass(frozen=True)
class ConditionEvaluation:
    """One model's evaluation under several conditions."""

    whole: Evaluation  # the file, and what it holds without conditions
    completion_length: int  # the configuration's own
    conditions: Mapping[Condition, ConditionFigures]
    calibration: Mapping[float, CalibrationFigures]  # by temperature
    ce_per_position: Numbers | None  # [R, POSITION_BINS]

    def condition(
        self, temperature: float, length: int | None = None, features: str = TRAINED_FEATURES
    ) -> ConditionFigures:
        """The figures under a condition; `length` None is the configuration's own.

        Raises:
            InputError: it was not evaluated.
        """
        asked = Condition(temperature, self.completion_length if length is None else length, features)
        if asked not in self.conditions:
            raise InputError([self.lacks(asked)])
        return self.conditions[asked]

    def lacks(self, asked: Condition) -> Problem:
        """The problem that a condition was not evaluated."""
        there = ", ".join(each.label for each in self.conditions) or "nothing"
        return Problem(str(self.whole.path), "conditions", there, f"{asked.label}: evaluate again (tools/evaluate.py)")


def read_condition_evaluations(
    given: Mapping[str, Path], of_one_seed: Sequence[Sequence[str]] | None = None
) -> dict[str, ConditionEvaluation]:
    """Read several evaluations with conditions and check that their rows are pairs.

    Args:
        given: name and `evaluation.json`, or the directory that holds one.
        of_one_seed: groups of names that are compared with each other, and so have the same features; None is one of
            all names.
    Raises:
        InputError: all files that are missing, damaged or of other rows than the first one, at once.
    """
    problems: list[Problem] = []
    found: dict[str, ConditionEvaluation] = {}
    for name, path in given.items():
        try:
            found[name] = _read_one(path)
        except InputError as error:
            problems += error.problems
    if found:
        first_name, first = next(iter(found.items()))
        for evaluation in found.values():
            problems += pairing_problems(evaluation.whole, first.whole, first_name, PAIRED_FIELDS)
        for names in [list(given)] if of_one_seed is None else of_one_seed:
            problems += _features_differ([(name, found[name]) for name in names if name in found])
    if problems:
        raise InputError(list(dict.fromkeys(problems)))
    return found


def _features_differ(named: Sequence[tuple[str, ConditionEvaluation]]) -> list[Problem]:
    problems: list[Problem] = []
    for _, evaluation in named[1:]:
        problems += pairing_problems(
            evaluation.whole, named[0][1].whole, named[0][0], FEATURE_FIELDS, with_groups=False
        )
    return problems


def _read_one(given: Path) -> ConditionEvaluation:
    whole = read_evaluation(given)
    with reading(whole.path, "conditions", WRITTEN_BY):
        return _with_conditions(whole)


def _with_conditions(whole: Evaluation) -> ConditionEvaluation:
    content, reader = whole.content, _Reader(whole, [])
    if not isinstance(content.get("conditions"), list) or not content["conditions"]:
        found = "nothing" if "conditions" not in content else repr(content["conditions"])[:60]
        raise InputError([Problem(str(whole.path), "conditions", found, f"conditions: {WRITTEN_BY}")])
    conditions = {}
    for place, each in enumerate(content["conditions"]):
        condition = reader.condition(each, place)
        conditions[condition] = ConditionFigures(
            {key: reader.rows(values, f"conditions[{place}].{key}") for key, values in each["per_row"].items()},
            {
                key: reader.rows(values, f"conditions[{place}].per_position.{key}", POSITION_BINS)
                for key, values in each.get("per_position", {}).items()
            },
        )
    calibration = {}
    for place, each in enumerate(content.get("calibration", [])):
        per_row, where = each["per_row"], f"calibration[{place}]"
        bins = {name: reader.rows(per_row[key], f"{where}.{key}", CONFIDENCE_BINS) for name, key in BINS.items()}
        brier = reader.rows(per_row["eval/brier"], f"{where}.eval/brier")
        calibration[float(each["temperature"])] = CalibrationFigures(brier, **bins)
    positions = content.get("ce_per_position")
    by_position = None if positions is None else reader.rows(positions, "ce_per_position", POSITION_BINS)
    if reader.problems:
        raise InputError(reader.problems)
    # The arrays stand for the lists, which take ten times as much memory.
    rest = {key: value for key, value in content.items() if key not in ("conditions", "calibration", "ce_per_position")}
    own = _own_length(whole, conditions)
    return ConditionEvaluation(replace(whole, content=rest), own, conditions, calibration, by_position)


@dataclass(frozen=True)
class _Reader:
    """Turns lists of the file into arrays, and collects what is wrong with them."""

    whole: Evaluation
    problems: list[Problem]

    def condition(self, each: Mapping[str, Any], place: int) -> Condition:
        temperature, length, features = (each[key] for key in ("temperature", "completion_length", "features"))
        is_number = isinstance(temperature, int | float) and not isinstance(temperature, bool) and temperature > 0
        if not (is_number and type(length) is int and length > 0 and isinstance(features, str)):
            found = f"{temperature!r}, {length!r}, {features!r}"
            expected = "temperature, completion_length (tokens) and features (a name)"
            self.problems.append(Problem(str(self.whole.path), f"conditions[{place}]", found, expected))
            return Condition(0.0, 0)
        return Condition(float(temperature), length, features)

    def rows(self, values: Any, key: str, width: int | None = None) -> Numbers:
        """[R] or, with a width, [R, width]; null becomes NaN."""
        shape = (self.whole.content["rows"],) if width is None else (self.whole.content["rows"], width)
        flat = list(values if width is None else itertools.chain.from_iterable(values))
        if not set(map(type, flat)) <= {int, float, type(None)}:
            self.problems.append(Problem(str(self.whole.path), key, "values of other kinds", "numbers or null"))
            return np.full(shape, np.nan)
        found = np.array([np.nan if value is None else float(value) for value in flat], dtype=np.float64)
        is_even = width is None or all(len(row) == width for row in values)
        if len(values) != shape[0] or not is_even:
            expected = " x ".join(map(str, shape))
            self.problems.append(Problem(str(self.whole.path), key, f"{len(values)} rows of values", expected))
            return np.full(shape, np.nan)
        if np.isinf(found).any() or np.isnan(found).sum() != flat.count(None):
            self.problems.append(Problem(str(self.whole.path), key, "a value that is not finite", "finite numbers"))
        return found.reshape(shape)


def _own_length(whole: Evaluation, conditions: Mapping[Condition, ConditionFigures]) -> int:
    """The configuration's completion length; where a file does not say it, that of the only length there is."""
    lengths = sorted({condition.completion_length for condition in conditions})
    own = whole.content.get("completion_length", lengths[0] if len(lengths) == 1 else None)
    if type(own) is not int or own not in lengths:
        expected = f"one of {', '.join(map(str, lengths))}"
        raise InputError([Problem(str(whole.path), "completion_length", repr(own), expected)])
    return own
