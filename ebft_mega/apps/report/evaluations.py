"""Read the `evaluation.json` files of a comparison, and compute paired differences between them."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebft_mega.apps.report.metric_names import EVALUATION_METRICS, EvaluationMetric
from ebft_mega.apps.report.run_records import read_json
from ebft_mega.errors import InputError, Problem
from ebft_mega.evaluation.bootstrap import Interval, paired_bootstrap
from ebft_mega.io.parse_boundary import reading

# Fields in which two evaluations must agree, or else their rows are not paired, and what makes them agree.
SHARED_FIELDS = {
    "data": "give the same --data to both",
    "rows": "give the same --rows to both",
    "skipped_rows": "give the same --skip-rows to both",
    "temperature": "give --config, and --set ebft.temperature=..., to both",
    "document_masking": "give --config, and --set data.document_masking=..., to both",
    "feature_model": "give --feature-model to both",
    "samples": "give the same --samples to both",
    "longest_completion": "give the same --completion-lengths to both",  # whose anchors are used
}
# Those that files of an earlier version do not have: where one of two lacks them, they are not compared.
NEW_FIELDS = ("samples", "longest_completion")
# Those that name places; an earlier version wrote them as they had been given.
PLACES = ("data", "feature_model")
# Values of files that were written before the field existed.
EARLIER_VALUES = {"document_masking": False}


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of one model on the held-out rows."""

    path: Path
    content: Mapping[str, Any]
    # Metric key to float64 [R]; NaN for a row without a figure: its masked documents hold no block, or it was left out.
    per_row: Mapping[str, NDArray[np.float64]]
    row_groups: tuple[str, ...] | None  # [R], document or package of each row

    def value(self, key: str) -> float | None:
        """Mean of a metric over the rows, None if it was not measured."""
        value = self.content.get(key)
        return None if value is None else float(value)

    @property
    def left_out(self) -> str:
        """What is not in the figures because it was not finite, in words; empty if nothing is."""
        counts = {name: _left_out(self.content, f"eval/{name}_left_out") for name in ("blocks", "rows")}
        blocks, rows = f"{counts['blocks']} blocks", f"the cross-entropy of {counts['rows']} rows"
        return " and ".join(text for text, count in zip((blocks, rows), counts.values(), strict=True) if count)


@dataclass(frozen=True)
class Difference:
    """One arm minus another on one metric."""

    arm: str
    against: str
    metric: EvaluationMetric
    by_row: Interval
    by_group: Interval | None  # cluster bootstrap, None if rows have no groups

    @property
    def sign(self) -> int:
        """1 or -1 only if every computed interval lies on that side of zero, else 0."""
        if self.by_group is not None and self.by_group.sign != self.by_row.sign:
            return 0
        return self.by_row.sign

    @property
    def widest(self) -> Interval:
        """The wider of the two intervals, which is quoted beside a direction."""
        intervals = [self.by_row] if self.by_group is None else [self.by_row, self.by_group]
        return max(intervals, key=lambda interval: interval.high - interval.low)


def read_evaluations(arms: Mapping[str, Path]) -> dict[str, Evaluation]:
    """Read the evaluations of several arms and check that they can be compared row by row.

    Args:
        arms: name of each arm and its `evaluation.json`, or the directory that holds one.
    Returns:
        Evaluations by arm, in the same order.
    Raises:
        InputError: all files that are damaged or do not match the first one, at once.
    """
    problems: list[Problem] = []
    evaluations: dict[str, Evaluation] = {}
    for name, given in arms.items():
        try:
            evaluations[name] = read_evaluation(given)
        except InputError as error:
            problems.extend(error.problems)
    if evaluations:
        first_name, first = next(iter(evaluations.items()))
        for evaluation in evaluations.values():
            problems.extend(pairing_problems(evaluation, first, first_name))
    if problems:
        raise InputError(problems)
    return evaluations


def differences(
    evaluations: Mapping[str, Evaluation], arm: str, against: str, num_resamples: int, seed: int
) -> list[Difference]:
    """Compute paired differences of two arms with intervals, for every metric that both have per row.

    Rows for which one of them has no value are left out, and so are metrics with fewer than two other rows.

    Args:
        evaluations: by arm, from `read_evaluations`.
        arm, against: the difference is `arm` minus `against`.
        num_resamples, seed: of the bootstrap.
    """
    ours, theirs = evaluations[arm], evaluations[against]
    found = []
    for metric in EVALUATION_METRICS:
        if metric.key not in ours.per_row or metric.key not in theirs.per_row:
            continue
        difference = ours.per_row[metric.key] - theirs.per_row[metric.key]
        paired = np.flatnonzero(~np.isnan(difference))
        if len(paired) < 2:
            continue
        groups = None if ours.row_groups is None else [ours.row_groups[row] for row in paired]
        by_row = paired_bootstrap(difference[paired], num_resamples, seed)
        by_group = _by_group(difference[paired], groups, num_resamples, seed)
        found.append(Difference(arm, against, metric, by_row, by_group))
    return found


def _by_group(
    difference: NDArray[np.float64], groups: Sequence[str] | None, num_resamples: int, seed: int
) -> Interval | None:
    if groups is None or len(set(groups)) < 2:
        return None
    return paired_bootstrap(difference, num_resamples, seed, groups=groups)


def read_evaluation(given: Path) -> Evaluation:
    """Read one `evaluation.json`, or that of a directory.

    Raises:
        InputError: it is missing or damaged.
    """
    path = given / "evaluation.json" if given.is_dir() else given
    content = read_json(path)
    with reading(path, "(contents)", "what tools/evaluate.py has written"):
        return _evaluation(path, content)


def _evaluation(path: Path, content: dict[str, Any]) -> Evaluation:
    """An evaluation, from the contents of its file; whatever it raises is about them."""
    problems: list[Problem] = []
    num_rows = content.get("rows")
    if type(num_rows) is not int or num_rows < 2:
        raise InputError([Problem(str(path), "rows", repr(num_rows), "a number of rows, at least 2")])
    per_row: dict[str, NDArray[np.float64]] = {}
    for metric in EVALUATION_METRICS:
        mean = content.get(metric.key)
        if mean is not None and not _is_number(mean):
            problems.append(Problem(str(path), metric.key, repr(mean), "a number or null"))
    for key, values in content.get("per_row", {}).items():
        if not all(value is None or _is_number(value) for value in values):
            problems.append(Problem(str(path), f"per_row.{key}", "values of other kinds", "numbers or null"))
            continue
        is_missing = [value is None and _may_lack(content, key) for value in values]
        vector = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
        if vector.shape != (num_rows,):
            problems.append(Problem(str(path), f"per_row.{key}", f"{len(values)} values", f"{num_rows}"))
        elif not (np.isfinite(vector) | is_missing).all():
            bad = int(np.flatnonzero(~(np.isfinite(vector) | is_missing))[0])
            problems.append(Problem(str(path), f"per_row.{key}", f"row {bad} is not finite", "finite numbers"))
        else:
            per_row[key] = vector
    groups = content.get("row_groups")
    if groups is not None and len(groups) != num_rows:
        problems.append(Problem(str(path), "row_groups", f"{len(groups)} values", f"{num_rows}"))
    if problems:
        raise InputError(problems)
    return Evaluation(path, content, per_row, None if groups is None else tuple(map(str, groups)))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _may_lack(content: Mapping[str, Any], key: str) -> bool:
    """Whether rows may have no figure: masked documents without a block, and what was left out and counted."""
    if key == "eval/ce_loss":
        return _left_out(content, "eval/rows_left_out") > 0
    return bool(content.get("document_masking")) or _left_out(content, "eval/blocks_left_out") > 0


def _left_out(content: Mapping[str, Any], key: str) -> int:
    """A count of an evaluation; 0 where a file is from before it was counted."""
    count = content.get(key, 0)
    return int(count) if isinstance(count, int | float) else 0


def evaluation_facts(groups: Sequence[Mapping[str, Evaluation]]) -> list[tuple[str, str]]:
    """What the head of a page says of evaluations: models, data, tokens and date.

    Args:
        groups: evaluations by arm; several for several seeds.
    """
    found = [evaluation for group in groups for evaluation in group.values()]

    def different(key: str) -> list[str]:
        return list(dict.fromkeys(str(each.content[key]) for each in found if key in each.content))

    rows, length = found[0].content["rows"], found[0].content.get("sequence_length")
    tokens = f" of {length:,} tokens: {rows * length:,} tokens" if type(length) is int else ""
    days = sorted(datetime.fromtimestamp(each.path.stat().st_mtime, UTC) for each in found)
    first, last = (f"{day:%Y-%m-%d %H:%M} UTC" for day in (days[0], days[-1]))
    facts = [
        ("models", ", ".join(different("model"))),
        ("features of", ", ".join(different("feature_model"))),
        ("data", ", ".join(different("data"))),
        ("tokens", f"{rows:,} held-out rows{tokens}"),
        ("evaluated", first if first == last else f"{first} to {last}"),
    ]
    return [(label, text) for label, text in facts if text]


def left_out_notes(evaluations: Mapping[str, Evaluation]) -> list[str]:
    """One sentence for every arm whose figures lack something."""
    return [
        f"{name}: {evaluation.left_out} were left out, because something was not finite."
        for name, evaluation in evaluations.items()
        if evaluation.left_out
    ]


def _shared(evaluation: Evaluation, field: str) -> Any:
    return evaluation.content.get(field, EARLIER_VALUES.get(field))


def pairing_problems(
    evaluation: Evaluation,
    first: Evaluation,
    first_name: str,
    fields: Mapping[str, str] = SHARED_FIELDS,
    with_groups: bool = True,
) -> list[Problem]:
    """Name the fields in which an evaluation differs from the first one, so that their rows are not paired.

    Args:
        fields: to compare, each with what makes two evaluations agree in it.
        with_groups: whether to compare the rows' documents, too.
    """
    problems = []
    for field, advice in fields.items():
        values = [_shared(each, field) for each in (evaluation, first)]
        if field in NEW_FIELDS and None in values:
            continue
        if field in PLACES:
            values = [os.path.abspath(value) if isinstance(value, str) else value for value in values]
        found, wanted = ("nothing" if value is None else repr(value) for value in values)
        if found != wanted:
            expected = (
                f"{wanted}, as for {first_name!r}: rows are compared in pairs; evaluate again (tools/evaluate.py)"
            )
            problems.append(Problem(str(evaluation.path), field, found, f"{expected}, and {advice}"))
    if with_groups and evaluation.row_groups != first.row_groups and not problems:
        expected = f"the groups of {first_name!r}: evaluate both (tools/evaluate.py) on the same build of the dataset"
        problems.append(Problem(str(evaluation.path), "row_groups", "other groups", expected))
    return problems
