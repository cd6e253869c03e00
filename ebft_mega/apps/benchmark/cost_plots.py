"""Plots of seconds and FLOPs per step against row length, samples and stride."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ebft_mega.apps.benchmark.tables import SIDE_NAMES, linear_flops

COLOURS = {
    "naive": "#d9480f",
    "naive_checkpointing": "#c2255c",
    "naive_sdpa": "#f59f00",
    "ours": "#1f6feb",
    "ours_unmerged": "#a5c8ff",
    "ours_activations": "#2b8a3e",
    "ours_activations_unmerged": "#a3d9ae",
    "ours_off": "#868e96",
}
AXES = (("sequence_length", "row length L"), ("samples", "samples n"), ("stride", "stride"))


def draw_costs(cases: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw seconds and FLOPs of all sides, one of L, n and stride varying in each column.

    Args:
        cases: of the bench file; the others vary one quantity of the first.
        path: PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(3, len(AXES), figsize=(12.5, 9.5), squeeze=False)
    quantities: tuple[tuple[str, Callable[[Mapping[str, Any]], float | None]], ...] = (
        ("seconds per step (median)", lambda side: side["seconds_median"]),
        ("GFLOP per row, all", lambda side: side["flops"] / 1e9),
        ("linear GFLOP per row, each once", lambda side: linear_flops(side) / 1e9),
    )
    for column, (key, label) in enumerate(AXES):
        others = [name for name, _ in AXES if name != key]
        varied = sorted(
            (case for case in cases if all(case[name] == cases[0][name] for name in others)), key=lambda case: case[key]
        )
        for row, (quantity, value_of) in enumerate(quantities):
            axes = grid[row][column]
            for name, colour in COLOURS.items():
                points = [(case[key], value_of(case[name])) for case in varied if name in case]
                known = [(x, y) for x, y in points if y is not None]
                if known:
                    axes.plot(*zip(*known, strict=True), color=colour, marker="o", markersize=4, label=SIDE_NAMES[name])
            axes.set(xscale="log", yscale="log", xlabel=label, ylabel=quantity)
            axes.set_xticks([case[key] for case in varied], [str(case[key]) for case in varied])
            axes.minorticks_off()
            axes.grid(alpha=0.25)
    handles = {text: handle for axes in grid[0] for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
