"""The comparison page: trained models ("arms") on the same held-out rows, with intervals of their differences."""

import os
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from ebft_mega.apps.report.evaluations import (
    Difference,
    Evaluation,
    differences,
    evaluation_facts,
    left_out_notes,
    read_evaluations,
)
from ebft_mega.apps.report.metric_names import EVALUATION_METRICS
from ebft_mega.apps.report.page import Figure, Table, write_page
from ebft_mega.apps.report.plots import draw_intervals
from ebft_mega.evaluation.bootstrap import Interval
from ebft_mega.io.durable import write_json

NUM_RESAMPLES = 10_000
CAVEATS = (
    "Each arm was trained once (one seed): the intervals cover the choice of held-out rows, not the "
    "randomness of training. Several seeds: make study.",
    "Each interval is a 95 % interval of its own; among this many, one or two may leave out zero by chance.",
    "Alignment and raw cosine also rise when a policy only gets sharper; the feature-matching loss and the "
    "duplicate share then rise with them. Read the four together.",
)


def write_comparison(
    arms: Mapping[str, Path],
    output: Path,
    reference: str | None = None,
    *,
    arm_facts: Mapping[str, Mapping[str, str]] | None = None,
    links: Mapping[str, Path] | None = None,
    notes: Sequence[str] = (),
    seed: int = 0,
) -> Path:
    """Compare arms by paired bootstrap and write `report.html`, `comparison.json` and a plot.

    Args:
        arms: name of each arm and its `evaluation.json` (or the directory holding it), at least two.
        output: directory of the page, made if missing.
        reference: the arm that all others are compared with (the warm start); the first one by default. The
            other arms are also compared with each other, a later one against an earlier one.
        arm_facts: for each arm, what it cost and how it was trained (label to text).
        links: pages to link to, by their text.
        notes: statements of the caller about the comparison, e.g. that these rows were not used to choose settings.
        seed: of the bootstrap.
    Returns:
        The page.
    Raises:
        InputError: a file is missing or damaged, or the arms were not evaluated on the same rows.
    Communication: none.
    """
    evaluations = read_evaluations(arms)
    names = list(evaluations)
    base = reference or names[0]
    others = [name for name in names if name != base]
    pairs = [(arm, base) for arm in others] + [(later, earlier) for earlier, later in combinations(others, 2)]
    compared = {pair: differences(evaluations, *pair, NUM_RESAMPLES, seed) for pair in pairs}

    output.mkdir(parents=True, exist_ok=True)
    statements = [_statement(pair, group) for pair, group in compared.items() if group]
    found = [difference for group in compared.values() for difference in group]
    conditions = _conditions(evaluations[base])
    path = output / "report.html"
    write_page(
        path,
        "comparison.html",
        facts=evaluation_facts([evaluations]),
        title="Arms side by side",
        subtitle=f"{', '.join(names)} on the same held-out rows",
        statements=statements,
        conditions=conditions,
        reference=base,
        values=_values_table(evaluations, base, compared),
        differences=_differences_table(found),
        plot=_plot(found, output),
        remarks=[*notes, *left_out_notes(evaluations), *CAVEATS],
        metrics=[f"{metric.label}: {metric.meaning}" for metric in EVALUATION_METRICS],
        arms=_facts_table(names, arm_facts) if arm_facts else None,
        links={text: Path(os.path.relpath(target, output)).as_posix() for text, target in (links or {}).items()},
    )
    summary = _summary(evaluations, compared, statements, conditions)
    write_json(output / "comparison.json", summary)
    return path


def _conditions(evaluation: Evaluation) -> str:
    content = evaluation.content
    text = f"{content['rows']} held-out rows, temperature {content.get('temperature')}"
    if content.get("document_masking"):
        text += " with masked documents"
    if evaluation.row_groups is not None:
        text += f" from {len(set(evaluation.row_groups))} groups (documents or packages)"
    text += f"; paired bootstrap, {NUM_RESAMPLES:,} resamples, 95 % intervals"
    if evaluation.row_groups is not None:
        text += ": the wider of drawing rows and drawing groups is quoted, and a direction needs both"
    return f"{text}."


def _statement(pair: tuple[str, str], found: Sequence[Difference]) -> str:
    """One sentence about two arms; a direction is stated only where every interval excludes zero."""
    by_sign: dict[int, list[str]] = {-1: [], 1: [], 0: []}
    for difference in found:
        interval = format_interval(difference.widest)
        by_sign[difference.sign].append(f"{difference.metric.label} ({interval})")
    parts = [
        f"{word}: {', '.join(by_sign[sign])}"
        for sign, word in ((-1, "lower"), (1, "higher"), (0, "no difference shown at 95 %"))
        if by_sign[sign]
    ]
    return f"{pair[0]} against {pair[1]} — {'; '.join(parts)}."


def format_interval(interval: Interval) -> str:
    """Format a mean with its interval: `-0.0030 [-0.0053, -0.0007]`."""
    return f"{interval.mean:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"


def _values_table(
    evaluations: Mapping[str, Evaluation],
    base: str,
    compared: Mapping[tuple[str, str], Sequence[Difference]],
) -> Table:
    """One row per metric, one column per arm, a triangle where the arm differs from the reference."""
    signs = {
        (arm, difference.metric.key): difference.sign
        for (arm, against), found in compared.items()
        if against == base
        for difference in found
    }
    rows = []
    for metric in EVALUATION_METRICS:
        values = {name: evaluation.value(metric.key) for name, evaluation in evaluations.items()}
        if all(value is None for value in values.values()):
            continue
        cells = [
            "-" if value is None else f"{value:.4f} {_mark(signs.get((name, metric.key), 0))}".strip()
            for name, value in values.items()
        ]
        rows.append([metric.label, metric.direction, *cells])
    return Table(["metric", "better", *evaluations], rows, num_text_columns=2)


def _mark(sign: int) -> str:
    return {1: "▲", -1: "▼", 0: ""}[sign]


def _differences_table(found: Sequence[Difference]) -> Table:
    """One row per difference, with a column of intervals by group if rows have groups."""
    has_groups = any(difference.by_group is not None for difference in found)
    header = ["difference", "metric", "by row"] + (["by group"] if has_groups else []) + ["shown"]
    rows = []
    for difference in found:
        row = [f"{difference.arm} - {difference.against}", difference.metric.label]
        row.append(format_interval(difference.by_row))
        if has_groups:
            row.append("-" if difference.by_group is None else format_interval(difference.by_group))
        row.append({1: "higher", -1: "lower", 0: "-"}[difference.sign])
        rows.append(row)
    return Table(header, rows, num_text_columns=2)


def _plot(found: Sequence[Difference], output: Path) -> Figure | None:
    """Draw the intervals by row, one panel per metric; None without any."""
    if not found:
        return None
    panels: dict[str, dict[str, Interval]] = {}
    for difference in found:
        label = f"{difference.arm} - {difference.against}"
        panels.setdefault(difference.metric.label, {})[label] = difference.by_row
    image = output / "differences.png"
    draw_intervals(panels, image)
    caption = "Differences with their 95 % intervals by row; each metric has its own scale."
    return Figure.of(image, caption)


def _facts_table(names: Sequence[str], facts: Mapping[str, Mapping[str, str]]) -> Table:
    labels = list(dict.fromkeys(label for name in names for label in facts.get(name, {})))
    rows = [[label, *(facts.get(name, {}).get(label, "-") for name in names)] for label in labels]
    return Table(["", *names], rows)


def _summary(
    evaluations: Mapping[str, Evaluation],
    compared: Mapping[tuple[str, str], Sequence[Difference]],
    statements: Sequence[str],
    conditions: str,
) -> dict[str, Any]:
    """The contents of `comparison.json`: the numbers of the page for programs."""
    values = {
        name: {metric.key: evaluation.value(metric.key) for metric in EVALUATION_METRICS}
        for name, evaluation in evaluations.items()
    }
    return {
        "conditions": conditions,
        "values": values,
        "differences": [
            {
                "arm": difference.arm,
                "against": difference.against,
                "metric": difference.metric.key,
                "by_row": vars(difference.by_row),
                "by_group": None if difference.by_group is None else vars(difference.by_group),
                "shown": {1: "higher", -1: "lower", 0: "none"}[difference.sign],
            }
            for found in compared.values()
            for difference in found
        ],
        "statements": list(statements),
    }
