"""PNG plots of curves and intervals, drawn without a display."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ebft_mega.apps.report.run_records import Curve
from ebft_mega.evaluation.bootstrap import Interval
from ebft_mega.io.durable import write_bytes
from ebft_mega.shown_text import shown_label

COLOURS = ("#1f6feb", "#d9480f", "#2b8a3e", "#7048e8", "#868e96", "#c2255c")
DOTS_PER_INCH = 130
NUM_COLOURS = 64
# Curves with more points than this are smoothed; the raw values stay visible behind.
SMOOTHED_FROM = 40


@dataclass(frozen=True)
class Chart:
    """One plot of a report: which metric keys it shows and how."""

    name: str
    title: str
    caption: str
    series: tuple[tuple[str, str], ...]  # metric key, label
    logarithmic: bool = False


def draw_chart(chart: Chart, curves: Mapping[str, Curve], path: Path) -> bool:
    """Draw the curves of a chart that exist.

    Args:
        chart: what to show.
        curves: steps and values by metric key.
        path: PNG file to write.
    Returns:
        False, and nothing is written, if none of the chart's keys was logged.
    """
    present = [(key, label) for key, label in chart.series if key in curves]
    if not present:
        return False
    figure, axes = labelled_axes(chart.title)
    for colour, (key, label) in zip(COLOURS, present, strict=False):
        steps, values = curves[key]
        if len(steps) > SMOOTHED_FROM:
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, smooth(values), color=colour, linewidth=1.8, label=shown_label(label))
        else:
            axes.plot(steps, values, color=colour, linewidth=1.6, marker="o", markersize=3, label=shown_label(label))
    steps_on_x(axes, steps=[step for key, _ in present for step in curves[key][0]])
    if chart.logarithmic and all(value > 0 for key, _ in present for value in curves[key][1]):
        axes.set_yscale("log")
    if len(present) > 1:
        axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)
    return True


def draw_phases(curves: Mapping[str, Curve], phases: Sequence[tuple[str, str]], whole: str, path: Path) -> bool:
    """Draw the seconds of each phase of a step on top of each other.

    Args:
        curves: steps and values by metric key.
        phases: metric key and label of each phase, from the bottom up.
        whole: key of the whole step's seconds; the rest that is in no phase is shown as "other".
        path: PNG file to write.
    Returns:
        False, and nothing is written, if the step's seconds were not logged.
    """
    if whole not in curves:
        return False
    steps, totals = curves[whole]
    layers, labels = [], []
    for key, label in phases:
        if key in curves:
            by_step = dict(zip(*curves[key], strict=True))
            layers.append(np.array([by_step.get(step, 0.0) for step in steps]))
            labels.append(shown_label(label))
    explained = np.sum(layers, axis=0) if layers else np.zeros(len(steps))
    layers.append(np.maximum(np.asarray(totals) - explained, 0.0))
    labels.append("other")
    figure, axes = labelled_axes("Seconds per step, by phase")
    axes.stackplot(steps, layers, labels=labels, colors=COLOURS, alpha=0.85)
    # The first step compiles and allocates; if the axis included it, all others would look flat.
    top = float(np.quantile(totals, 0.98)) if len(totals) > 20 else max(totals)
    axes.set_ylim(0, top * 1.35 or 1.0)
    steps_on_x(axes, steps)
    axes.legend(frameon=False, fontsize=8, loc="upper right", ncols=3)
    save_figure(figure, path)
    return True


def draw_intervals(panels: Mapping[str, Mapping[str, Interval]], path: Path) -> None:
    """Draw differences with their intervals, one panel per metric, each on its own scale.

    Args:
        panels: metric title to comparison label to interval.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure

    num_columns = min(3, len(panels))
    num_rows = -(-len(panels) // num_columns)
    height = 0.9 + 0.32 * max(len(intervals) for intervals in panels.values())
    figure = Figure(figsize=(3.6 * num_columns, height * num_rows), layout="constrained")
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for index, (axes, (title, intervals)) in enumerate(zip(grid.flat, panels.items(), strict=False)):
        _decorate(axes, title)
        axes.axvline(0.0, color="#868e96", linewidth=1.0, linestyle="--")
        for position, interval in enumerate(intervals.values()):
            colour = COLOURS[position % len(COLOURS)]
            axes.plot([interval.low, interval.high], [position, position], color=colour, linewidth=2.0)
            axes.plot(interval.mean, position, marker="o", color=colour, markersize=5)
        labels = [shown_label(label) for label in intervals] if index % num_columns == 0 else []
        axes.set_yticks(range(len(intervals)), labels=labels or [""] * len(intervals), fontsize=8)
        axes.set_ylim(len(intervals) - 0.5, -0.5)
        axes.locator_params(axis="x", nbins=4)
    save_figure(figure, path)


def smooth(values: Sequence[float]) -> list[float]:
    """Centred running mean over about a twentieth of the curve; the ends use what is there.

    Args:
        values: [N], one per logged step.
    Returns:
        [N] means, in the unit of the values.
    """
    half = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    positions = np.arange(len(values))
    low = np.maximum(positions - half, 0)
    high = np.minimum(positions + half + 1, len(values))
    smoothed: list[float] = ((sums[high] - sums[low]) / (high - low)).tolist()
    return smoothed


def labelled_axes(title: str) -> tuple[Any, Any]:
    """Return a figure of the pages' size and its axes, with a title."""
    # The object interface keeps no global state and picks the Agg canvas, so no display is needed.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.1), layout="constrained")
    axes = figure.subplots()
    _decorate(axes, title)
    return figure, axes


def steps_on_x(axes: Any, steps: Sequence[int]) -> None:
    """Let an x axis show optimizer steps: whole numbers, also where there is a single one."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    if len(set(steps)) == 1:
        axes.set_xlim(steps[0] - 1, steps[0] + 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.set_xlabel("step")


def plain_numbers(axes: Any) -> None:
    """Write the numbers at both axes in full: no power of ten and no offset that is to be added stands apart."""
    axes.ticklabel_format(axis="both", style="plain", useOffset=False)


def _decorate(axes: Any, title: str) -> None:
    plain_numbers(axes)
    axes.set_title(shown_label(title), fontsize=10, loc="left", fontweight="bold")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as a PNG of the pages' resolution; its directory is made if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_figure(path, figure, DOTS_PER_INCH)


def write_figure(path: Path, figure: Any, dots_per_inch: int) -> None:
    """Write a figure as a PNG of few colours in place of what lies there.

    Raises:
        OSError: as for `write_bytes`.
    """
    from PIL import Image

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dots_per_inch)
    # Curves on white need few colours; a page holds some twenty of these images.
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(NUM_COLOURS, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
    write_bytes(path, small.getvalue())
