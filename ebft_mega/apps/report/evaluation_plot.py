"""Histograms of one evaluation's metrics over the held-out rows."""

from pathlib import Path

from ebft_mega.apps.report.plots import plain_numbers, write_figure
from ebft_mega.apps.report.run_records import read_json
from ebft_mega.shown_text import shown_label


def plot_evaluation(path: Path) -> Path:
    """Draw one histogram per metric of an `evaluation.json`; a metric that no row has is left out.

    Returns:
        The PNG beside it.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    content = read_json(path)
    known = {name: [value for value in values if value is not None] for name, values in content["per_row"].items()}
    per_row = {name: values for name, values in known.items() if values}
    num_panels = max(1, len(per_row))
    figure = Figure(figsize=(3.2 * num_panels, 2.8), layout="constrained")
    for axes, (name, values) in zip(figure.subplots(1, num_panels, squeeze=False)[0], per_row.items(), strict=False):
        plain_numbers(axes)
        axes.hist(values, bins=24, color="#4878a8")
        axes.axvline(content[name], color="black", linewidth=1)
        axes.set(title=f"{shown_label(name)}\nmean {content[name]:.4f}", xlabel="per row", ylabel="rows")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    target = path.with_name("evaluation.png")
    write_figure(target, figure, 110)
    return target
