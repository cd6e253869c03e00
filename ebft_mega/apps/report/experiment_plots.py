"""PNG plots of an experiment: curves with bands, and where arms lie between two losses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebft_mega.apps.report.plots import COLOURS, labelled_axes, save_figure
from ebft_mega.evaluation.bootstrap import Interval
from ebft_mega.shown_text import shown_label

MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # change after all colours are used
MOST_LABELS = 4  # within the axes; a longer legend stands beside them


@dataclass(frozen=True)
class Point:
    """Where something lies in a plane, with an interval each way."""

    x: Interval
    y: Interval


def draw_bands(
    title: str, axes: tuple[str, str], curves: Mapping[str, Mapping[float, Interval]], path: Path, at_zero: bool = False
) -> bool:
    """Draw one curve for each label, with its interval as a band.

    Args:
        axes: what x and y are.
        curves: by label, the interval at each place.
        path: PNG file to write.
        at_zero: whether to draw a line at zero, for differences.
    Returns:
        False, and nothing is written, if there is nothing to draw.
    """
    if not any(curves.values()):
        return False
    figure, drawn = labelled_axes(title)
    if at_zero:
        drawn.axhline(0.0, color="#868e96", linewidth=1.0, linestyle="--")
    for place, (label, curve) in enumerate(curves.items()):
        colour, marker = _style(place)
        x = sorted(curve)
        means = [curve[each].mean for each in x]
        drawn.plot(x, means, color=colour, marker=marker, markersize=4, linewidth=1.6, label=shown_label(label))
        low, high = ([getattr(curve[each], end) for each in x] for end in ("low", "high"))
        drawn.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    _finish(figure, drawn, axes, path, len(curves))
    return True


def draw_plane(
    title: str,
    axes: tuple[str, str],
    points: Mapping[str, Point],
    lines: Mapping[str, Sequence[tuple[float, float]]],
    path: Path,
) -> bool:
    """Draw points with their intervals, and lines that join some of them.

    Args:
        axes: what x and y are.
        points: by label.
        lines: by label, the places that a line joins.
        path: PNG file to write.
    Returns:
        False, and nothing is written, if there is no point.
    """
    if not points:
        return False
    figure, drawn = labelled_axes(title)
    for place, (label, line) in enumerate(lines.items()):
        style = ("-", "--", ":", "-.")[place % 4]
        x, y = zip(*line, strict=True) if line else ((), ())
        drawn.plot(x, y, color="#868e96", linewidth=1.2, linestyle=style, label=shown_label(label))
    for place, (label, point) in enumerate(points.items()):
        colour, marker = _style(place)
        drawn.plot([point.x.low, point.x.high], [point.y.mean] * 2, color=colour, linewidth=0.9, alpha=0.6)
        drawn.plot([point.x.mean] * 2, [point.y.low, point.y.high], color=colour, linewidth=0.9, alpha=0.6)
        drawn.plot(
            point.x.mean,
            point.y.mean,
            color=colour,
            marker=marker,
            markersize=5,
            linestyle="",
            label=shown_label(label),
        )
    _finish(figure, drawn, axes, path, len(points) + len(lines))
    return True


def _style(place: int) -> tuple[str, str]:
    return COLOURS[place % len(COLOURS)], MARKERS[place // len(COLOURS) % len(MARKERS)]


def _finish(figure: Any, drawn: Any, axes: tuple[str, str], path: Path, number: int) -> None:
    drawn.set_xlabel(shown_label(axes[0]), fontsize=9)
    drawn.set_ylabel(shown_label(axes[1]), fontsize=9)
    if number > MOST_LABELS:
        figure.set_size_inches(7.2, max(3.1, 0.18 * number + 0.5))
        figure.legend(frameon=False, fontsize=7, loc="outside right upper")
    else:
        drawn.legend(frameon=False, fontsize=8)
    save_figure(figure, path)
