"""The tables of an experiment's report, for its page and for Markdown. No torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from ebft_mega.apps.experiment.arm_values import Measure
from ebft_mega.apps.experiment.comparing import Evidence, Finding
from ebft_mega.apps.experiment.experiment_findings import ArmCost, Declared, Findings
from ebft_mega.apps.experiment.spec import ExperimentSpec
from ebft_mega.apps.experiment.trials import Choice
from ebft_mega.apps.report.metric_names import metric_named
from ebft_mega.apps.report.page import Table
from ebft_mega.evaluation.bootstrap import Interval
from ebft_mega.evaluation.conditions import POSITION_BINS
from ebft_mega.shown_text import shown

NOTHING = "-"


@dataclass(frozen=True)
class TitledTable:
    """A table with what a reader needs beside it."""

    title: str
    set_up: str  # seeds, rows, documents, temperatures
    table: Table

    def markdown(self) -> str:
        """The table as Markdown, with its title and set-up."""
        header, *rows = ([_cell(cell) for cell in row] for row in (self.table.header, *self.table.rows))
        text_columns = self.table.num_text_columns
        rule = ["---" if place < text_columns else "---:" for place in range(len(header))]
        lines = ["| " + " | ".join(row) + " |" for row in (header, rule, *rows)]
        return f"### {_cell(self.title)}\n\n{_cell(self.set_up)}\n\n" + "\n".join(lines) + "\n"


def interval_text(interval: Interval | None) -> str:
    """A mean with its interval: `-0.0030 [-0.0053, -0.0007]`."""
    if interval is None:
        return NOTHING
    return f"{interval.mean:+.5f} [{interval.low:+.5f}, {interval.high:+.5f}]"


def ends_text(interval: Interval | None) -> str:
    """The ends of an interval alone."""
    return NOTHING if interval is None else f"[{interval.low:+.5f}, {interval.high:+.5f}]"


def p_text(p: float | None) -> str:
    """A p value with as many digits as are read."""
    if p is None:
        return NOTHING
    return "<0.0001" if p < 1e-4 else f"{p:.4f}"


def number_text(value: float | None, unit: str = "") -> str:
    """A count or a duration: whole with separators, large ones in powers of ten."""
    if value is None:
        return NOTHING
    text = f"{value:.3g}" if abs(value) >= 1e9 else f"{value:,.1f}" if value != int(value) else f"{int(value):,}"
    return f"{text}{unit}"


def seeds_text(seeds: Sequence[int]) -> str:
    """How many seeds, and which."""
    return f"{len(seeds)} ({', '.join(map(str, seeds))})" if seeds else "none"


def choice_text(choice: Choice) -> str:
    """Chosen values, such as `optim.lr = 0.0003`."""
    return ", ".join(f"{key} = {value}" for key, value in choice) or NOTHING


def extent(findings: Findings) -> str:
    """Rows and documents of the report split."""
    rows = f"{findings.rows} rows"
    return rows if findings.documents is None else f"{rows} of {findings.documents} documents"


def declared_table(declared: Sequence[Declared], findings: Findings, title: str) -> TitledTable:
    """Comparisons that the spec names, with every interval, and at the other choice of temperatures."""
    is_primary = any(each.finding.corrected_p is not None for each in declared)
    header = ["difference", "metric", "better", "temperatures", "shown", "mean, widest interval", "rows", "documents"]
    header += ["seeds", "seeds and documents", "p"]
    header += ["p corrected", "simultaneous"] if is_primary else []
    header += ["at the other temperatures", "FLOPs", "CPU s", "seeds used"]
    costs = {each.arm: each for each in findings.costs}
    rows = []
    for each in declared:
        finding = each.finding
        interval = finding.evidence.interval
        row = [_pair(finding), *_metric(finding.metric), _temperatures(finding), finding.verdict]
        row += [interval_text(finding.evidence.quoted), ends_text(interval.by_rows), ends_text(interval.by_documents)]
        row += [ends_text(interval.by_seeds), ends_text(interval.combined), p_text(interval.p)]
        row += [p_text(finding.corrected_p), ends_text(finding.simultaneous)] if is_primary else []
        other = each.counterpart
        row += [
            NOTHING if other is None else f"{_temperatures(other)}: {interval_text(other.evidence.quoted)}",
            *_cost_ratios(costs[finding.arm], costs[finding.against]),
            seeds_text(finding.evidence.seeds),
        ]
        rows.append(row)
    number = len(declared)
    words = f"p corrected for {number} comparisons (Holm), simultaneous intervals (Bonferroni). " if is_primary else ""
    set_up = f"Arm minus other arm on {extent(findings)}, 95 % intervals. {words}"
    set_up += "FLOPs and CPU s: the arm's runs over those of the other."
    return TitledTable(title, set_up, Table(header, rows, num_text_columns=5))


def differences_table(findings: Findings) -> TitledTable:
    """Each arm against the first and against the one before it, all metrics, at best and at equal temperature."""
    header = ["difference", "metric", "better", "T, each its best", "mean, widest interval", "leaves out zero"]
    header += ["T, equal", "mean, widest interval", "leaves out zero", "seeds"]
    rows = []
    for _, group in groupby(findings.table, key=lambda each: (each.arm, each.against, each.metric)):
        by_at = {each.at: each for each in group}
        best, equal = by_at.get("best_temperature"), by_at.get("equal_temperature")
        any_of_them = best or equal
        assert any_of_them is not None
        row = [_pair(any_of_them), *_metric(any_of_them.metric)]
        for each in (best, equal):
            row += [NOTHING] * 3 if each is None else [_temperatures(each), *_told(each.evidence)]
        rows.append([*row, str(len(any_of_them.evidence.seeds))])
    set_up = (
        f"Arm minus other arm on {extent(findings)}; each interval is a 95 % interval of its own, so one in twenty of "
        "those without a difference leaves out zero by chance."
    )
    return TitledTable("Arms against the first and the one before", set_up, Table(header, rows, num_text_columns=4))


def arms_table(findings: Findings, chosen: dict[str, Choice]) -> TitledTable:
    """Each arm's own figures at its best temperatures."""
    metrics = list(dict.fromkeys(metric for arm in findings.arms for metric in arm.values))
    header = ["arm", "seeds", "chosen values", *(metric_named(metric).label for metric in metrics)]
    rows = []
    for arm in findings.arms:
        row = [arm.arm, seeds_text(arm.seeds), choice_text(chosen.get(arm.arm, ()))]
        for metric in metrics:
            value = arm.values.get(metric)
            row.append(NOTHING if value is None else f"{value.mean:.5f} (T {arm.temperatures[metric]:g})")
        rows.append(row)
    set_up = (
        f"Means over seeds on {extent(findings)}; T: each arm's best temperature for the metric on the tuning split."
    )
    return TitledTable("Arms", set_up, Table(header, rows, num_text_columns=3))


def curve_table(findings: Findings) -> TitledTable:
    """The feature-matching loss of each arm at each temperature."""
    temperatures = sorted({temperature for arm in findings.arms for temperature in arm.curve})
    rows = [
        [arm.arm, *(f"{arm.curve[each].mean:.5f}" if each in arm.curve else NOTHING for each in temperatures)]
        for arm in findings.arms
    ]
    set_up = f"Means over seeds on {extent(findings)}."
    header = ["arm", *(f"T {temperature:g}" for temperature in temperatures)]
    return TitledTable("Feature-matching loss by temperature", set_up, Table(header, rows))


def condition_table(found: Iterable[Finding], findings: Findings, kind: str) -> TitledTable:
    """Differences of the feature-matching loss under other conditions.

    Args:
        kind: `features`, `length` or `position`.
    """
    title = {
        "features": "Feature-matching loss under each feature map",
        "length": "Feature-matching loss by completion length",
        "position": "By position in the row",
    }[kind]
    by_pair: dict[tuple[str, str], dict[str, str]] = {}
    for each in found:
        column = _column(each.measures[0], kind)
        text = interval_text(each.evidence.quoted)
        if kind == "position":
            text = f"{each.evidence.interval.mean:+.5f}{' *' if each.evidence.sign else ''}"
        elif kind == "features":
            text = f"{text} (T {_temperatures(each)})"
        label = metric_named(each.metric).label
        by_pair.setdefault((_pair(each), label), {})[column] = text
    columns = list(dict.fromkeys(column for cells in by_pair.values() for column in cells))
    rows = [[*pair, *(cells.get(column, NOTHING) for column in columns)] for pair, cells in by_pair.items()]
    words = "*: its own 95 % interval leaves out zero." if kind == "position" else "95 % intervals of their own."
    set_up = f"Arm minus other arm, each at its best temperature, on {extent(findings)}. {words}"
    return TitledTable(title, set_up, Table(["difference", "metric", *columns], rows, num_text_columns=2))


def fronts_table(findings: Findings) -> TitledTable:
    """Where the arms of each line lie."""
    rows = [
        [name, point.arm, f"{point.temperature:g}", _plain(point.ce), _plain(point.fm)]
        for name, points in findings.fronts.items()
        for point in points
    ]
    header = ["line", "arm", "T", "cross-entropy", "feature-matching loss"]
    set_up = f"Means with 95 % intervals over seeds and documents on {extent(findings)}."
    return TitledTable("Lines of cross-entropy and feature matching", set_up, Table(header, rows, num_text_columns=2))


def matched_table(findings: Findings) -> TitledTable:
    """Feature matching at matched cross-entropy."""
    header = [
        "arm",
        "line",
        "leaves out zero",
        "cross-entropy",
        "line from … to",
        "feature-matching loss",
        "of the line there",
    ]
    header += ["difference, widest interval", "seeds"]
    rows = []
    for each in findings.matched:
        row = [each.arm, each.front, "outside of the line's range" if each.is_outside else NOTHING]
        if each.evidence is not None:
            row[-1] = _told(each.evidence)[1]
        row += [f"{each.ce:.5f}", f"{each.ends[0]:.5f} … {each.ends[1]:.5f}", f"{each.fm:.5f}"]
        row.append(NOTHING if each.on_line is None else f"{each.on_line:.5f}")
        row.append(NOTHING if each.evidence is None else interval_text(each.evidence.quoted))
        rows.append([*row, NOTHING if each.evidence is None else str(len(each.evidence.seeds))])
    set_up = (
        f"Arm minus line at the arm's cross-entropy on {extent(findings)}, each arm at its best temperature; a draw of "
        "documents and seeds has a line of its own. Intervals are not corrected for their number."
    )
    title = "Feature-matching loss at matched cross-entropy"
    return TitledTable(title, set_up, Table(header, rows, num_text_columns=3))


def costs_table(costs: Sequence[ArmCost]) -> TitledTable:
    """What each arm took, and how much of the first arm's that is."""
    header = ["arm", "runs", "steps", "tokens", "FLOPs", "CPU s", "wall s", "FLOPs to the first", "CPU s to the first"]
    header += ["tuning runs", "CPU s of tuning"]
    first = next((each for each in costs if each.cpu_seconds is not None or each.flops is not None), None)
    rows = []
    for each in costs:
        row = [each.arm, str(each.runs)]
        row += [number_text(value) for value in (each.steps, each.tokens, each.flops, each.cpu_seconds)]
        row.append(number_text(each.wall_seconds))
        row.append(_ratio(each.flops, first.flops if first else None))
        row.append(_ratio(each.cpu_seconds, first.cpu_seconds if first else None))
        rows.append([*row, str(each.tuning_runs), number_text(each.tuning_cpu_seconds)])
    words = "" if first is None else f" The first with costs is {first.arm}."
    set_up = f"Means over an arm's runs, without those that it starts from; FLOPs are counted, CPU s measured.{words}"
    return TitledTable("Costs", set_up, Table(header, rows))


def all_tables(spec: ExperimentSpec, findings: Findings, chosen: dict[str, Choice]) -> dict[str, TitledTable]:
    """Every table that has rows, by the name that the page's template uses."""
    tables = {
        "arms": arms_table(findings, chosen),
        "primary": declared_table(findings.primary, findings, "Primary comparisons"),
        "secondary": declared_table(findings.secondary, findings, "Secondary comparisons"),
        "curve": curve_table(findings),
        "fronts": fronts_table(findings),
        "matched": matched_table(findings),
        "features": condition_table(findings.by_features, findings, "features"),
        "length": condition_table(findings.by_length, findings, "length"),
        "position": condition_table(findings.by_position, findings, "position"),
        "differences": differences_table(findings),
        "costs": costs_table(findings.costs),
    }
    return {name: table for name, table in tables.items() if table.table.rows}


def _cell(text: str) -> str:
    return shown(text, longest=2000).replace("|", "\\|")


def _pair(finding: Finding) -> str:
    return f"{finding.arm} - {finding.against}"


def _metric(name: str) -> tuple[str, str]:
    metric = metric_named(name)
    return metric.label, metric.direction


def _temperatures(finding: Finding) -> str:
    ours, theirs = (measure.temperature for measure in finding.measures)
    return f"{ours:g}" if ours == theirs else f"{ours:g} and {theirs:g}"


def _told(evidence: Evidence) -> tuple[str, str]:
    direction = {1: "higher", -1: "lower", 0: NOTHING}[evidence.sign]
    return interval_text(evidence.quoted), direction


def _column(measure: Measure, kind: str) -> str:
    if kind == "features":
        return measure.features
    if kind == "length":
        return f"{measure.length} tokens"
    assert measure.position is not None
    return f"{measure.position + 1} of {POSITION_BINS}"


def _plain(interval: Interval) -> str:
    return f"{interval.mean:.5f} [{interval.low:.5f}, {interval.high:.5f}]"


def _cost_ratios(ours: ArmCost, theirs: ArmCost) -> tuple[str, str]:
    return _ratio(ours.flops, theirs.flops), _ratio(ours.cpu_seconds, theirs.cpu_seconds)


def _ratio(value: float | None, of: float | None) -> str:
    return f"{value / of:.2f}" if value is not None and of else NOTHING
