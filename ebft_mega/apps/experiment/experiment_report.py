"""Write an experiment's report: a page, its numbers for programs, and its tables for documents."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from ebft_mega.apps.experiment.arm_values import CROSS_ENTROPY
from ebft_mega.apps.experiment.choosing import MAIN_METRIC, METRICS
from ebft_mega.apps.experiment.comparing import DECLARED_RESAMPLES, OTHER_RESAMPLES, Evidence, Finding
from ebft_mega.apps.experiment.experiment_findings import Findings, find
from ebft_mega.apps.experiment.experiment_sentences import (
    RULE,
    arm_sentences,
    experiment_extent,
    limit_sentences,
    secondary_sentence,
    verdict_sentences,
)
from ebft_mega.apps.experiment.experiment_tables import all_tables
from ebft_mega.apps.experiment.spec import ExperimentSpec
from ebft_mega.apps.experiment.trials import Choice, ExperimentResults
from ebft_mega.apps.report.experiment_plots import Point, draw_bands, draw_plane
from ebft_mega.apps.report.metric_names import metric_named
from ebft_mega.apps.report.page import Figure, write_page
from ebft_mega.apps.report.plots import draw_intervals
from ebft_mega.evaluation.bootstrap import Interval
from ebft_mega.io.durable import write_bytes, write_json
from ebft_mega.shown_text import shown

LOSS = metric_named(MAIN_METRIC).label


def write_report(spec: ExperimentSpec, results: ExperimentResults, output: Path) -> Path:
    """Write `report.html`, `findings.json`, `tables.md` and the plots of an experiment.

    Args:
        results: of all main runs, evaluated on both splits, and of the runs among which values were chosen.
        output: directory of the report, made if missing.
    Returns:
        The page.
    Raises:
        InputError: evaluations are missing or damaged, or their rows are no pairs; everything at once.
        OSError: as for `write_bytes`.
    Communication: none.
    """
    findings = find(spec, results)
    choices = chosen_values(results)
    tables = all_tables(spec, findings, choices)
    verdicts = verdict_sentences(findings.primary, len(findings.primary))
    secondary = [secondary_sentence(each) for each in findings.secondary]
    limits = limit_sentences(spec, findings)
    splits = {"report split": spec.splits.report, "tuning split": spec.splits.tuning}
    output.mkdir(parents=True, exist_ok=True)
    path = output / "report.html"
    write_page(
        path,
        "experiment.html",
        facts=list({**splits, **results.facts}.items()),
        title=spec.question,
        subtitle=experiment_extent(findings),
        verdicts=verdicts,
        rule=RULE,
        arms=arm_sentences(spec, findings, choices),
        secondary=secondary,
        tables=tables,
        figures=_figures(findings, output),
        limits=limits,
        metrics=[f"{metric.label}: {metric.meaning}" for metric in map(metric_named, METRICS)],
    )
    numbers = {
        "question": spec.question,
        "facts": results.facts,
        "chosen": {arm: dict(choice) for arm, choice in choices.items()},
        "resamples": {"declared": DECLARED_RESAMPLES, "others": OTHER_RESAMPLES},
        "verdicts": verdicts,
        "limits": limits,
        **_plain(findings),
    }
    write_json(output / "findings.json", numbers)
    head = [f"# {shown(spec.question)}", "", experiment_extent(findings) + ".", ""]
    text = "\n".join([*head, *(table.markdown() for table in tables.values())])
    write_bytes(output / "tables.md", text.encode())
    return path


def chosen_values(results: ExperimentResults) -> dict[str, Choice]:
    """The values that each arm's main runs took, also those chosen for an arm that it is like."""
    return {each.trial.arm: each.trial.choice for each in results.trials if each.trial.purpose == "main"}


def _figures(findings: Findings, output: Path) -> dict[str, list[Figure]]:
    """Draw everything that there is, by the place in the page."""
    figures: dict[str, list[Figure]] = {"temperature": [], "plane": [], "controls": []}

    def add(place: str, name: str, caption: str, is_drawn: bool) -> None:
        if is_drawn:
            figures[place].append(Figure.of(output / name, caption))

    curves = {arm.arm: arm.curve_beside_first for arm in findings.arms}
    drawn = draw_bands(f"{LOSS}, by temperature", ("temperature", LOSS), curves, output / "temperature.png")
    first = findings.arms[0].arm
    bands = f"95 % intervals of the difference from {first} at its best temperature, on the same rows"
    add("temperature", "temperature.png", f"Means over seeds; bands: {bands}.", drawn)

    for name in findings.fronts or ("all arms",):
        image = f"plane-{list(findings.fronts).index(name) if findings.fronts else 0}.png"
        line = [(each.ce.mean, each.fm.mean) for each in findings.fronts.get(name, ())]
        points = {
            arm.arm: Point(arm.ce_beside_first, arm.curve_beside_first[arm.temperatures[MAIN_METRIC]])
            for arm in findings.arms
            if arm.ce_beside_first is not None and MAIN_METRIC in arm.temperatures
        }
        axes = (metric_named(CROSS_ENTROPY).label, LOSS)
        lines = {name: line} if line else {}
        drawn = draw_plane(f"Cross-entropy and feature matching: {name}", axes, points, lines, output / image)
        add(
            "plane",
            image,
            f"Each arm at its best temperature; lower and further left is better. Lines: {bands}.",
            drawn,
        )

    _draw_declared(findings, output, add)
    drawn = draw_bands(
        f"{LOSS}: difference by completion length",
        ("tokens of a completion", "difference"),
        _curves(_named(findings.by_length, findings), lambda each: float(each.measures[0].length or 0)),
        output / "length.png",
        at_zero=True,
    )
    has_lengths = len({each.measures[0].length for each in findings.by_length}) > 1
    add("controls", "length.png", "Arm minus other arm, each at its best temperature.", drawn and has_lengths)
    for metric in (MAIN_METRIC, CROSS_ENTROPY):
        found = tuple(each for each in findings.by_position if each.metric == metric)
        title = f"{metric_named(metric).label}: difference by position"
        image = f"position-{metric}.png"
        drawn = draw_bands(
            title,
            ("part of the row", "difference"),
            _curves(_named(found, findings), lambda each: float((each.measures[0].position or 0) + 1)),
            output / image,
            at_zero=True,
        )
        add("controls", image, "Arm minus other arm; bands: the widest 95 % interval.", drawn)
    return figures


def _named(found: Sequence[Finding], findings: Findings) -> list[Finding]:
    """Those of the pairs that the spec compares, which a plot has room for; all where it names none."""
    pairs = {(each.finding.arm, each.finding.against) for each in (*findings.primary, *findings.secondary)}
    return [each for each in found if not pairs or (each.arm, each.against) in pairs]


def _draw_declared(findings: Findings, output: Path, add: Any) -> None:
    panels: dict[str, dict[str, Interval]] = {}
    for declared in (*findings.primary, *findings.secondary):
        for each in (declared.finding, declared.counterpart):
            if each is not None:
                at = "best T" if each.at == "best_temperature" else "equal T"
                label = f"{each.arm} - {each.against}, {at}"
                panels.setdefault(metric_named(each.metric).label, {})[label] = each.evidence.quoted
    for number, (title, intervals) in enumerate(panels.items()):
        image = f"differences-{number}.png"
        draw_intervals({title: intervals}, output / image)
        words = f"{title}: comparisons of the spec with their widest 95 % intervals."
        add("controls", image, words, True)


def _curves(found: Sequence[Finding], place: Any) -> dict[str, dict[float, Interval]]:
    curves: dict[str, dict[float, Interval]] = {}
    for each in found:
        curves.setdefault(f"{each.arm} - {each.against}", {})[place(each)] = each.evidence.quoted
    return curves


def _plain(value: Any) -> Any:
    """Values for JSON: what a number is not is null, and what follows from the numbers stands beside them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if is_dataclass(value) and not isinstance(value, type):
        found = {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
        if isinstance(value, Finding):
            found["verdict"] = value.verdict
        if isinstance(value, Evidence):
            found["quoted"] = _plain(value.quoted)
            found["sign"] = value.sign
        return found
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
