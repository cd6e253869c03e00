"""The page of one run: curves, held-out values, rollouts beside their targets, and how to run it again."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ebft_mega.apps.report import page
from ebft_mega.apps.report.metric_names import EVALUATION_METRICS
from ebft_mega.apps.report.plots import Chart, draw_chart, draw_phases
from ebft_mega.apps.report.run_records import Curve, curves, read_json, read_json_lines
from ebft_mega.runtime.run_files import ENVIRONMENT_NAME, RESOLVED_CONFIG_NAME

TRAINING_CHARTS = (
    Chart(
        "loss",
        "Training loss",
        "What the optimizer minimises, and the cross-entropy on the same rows (nats per token).",
        (("train/loss", "loss"), ("ebft/ce_loss", "cross-entropy")),
    ),
    Chart(
        "rl_loss",
        "RL loss",
        "Mean of -advantage x log-probability. Its value says little; its gradient is what trains.",
        (("ebft/rl_loss", "RL loss"),),
    ),
    Chart(
        "reward",
        "Reward and its terms",
        "Alignment: similarity of a rollout's features to the target's. Diversity: similarity of a block's "
        "rollouts to each other, which the reward subtracts. Both with their factor 2.",
        (
            ("ebft/alignment", "alignment"),
            ("ebft/diversity", "diversity"),
            ("ebft/mean_reward", "reward"),
        ),
    ),
    Chart(
        "cfm",
        "Conditional feature matching",
        "Squared distance between the mean rollout feature and the target feature, per block.",
        (("ebft/cfm_loss", "CFM"),),
    ),
    Chart(
        "advantage",
        "Advantage spread",
        "Standard deviation of the advantages; at zero the rollouts teach nothing.",
        (("ebft/advantages_std", "std of advantages"),),
    ),
    Chart(
        "duplicates",
        "Duplicate share",
        "Blocks in which two or more rollouts are equal; a rise means that the policy is sharpening.",
        (("ebft/duplicate_share", "duplicates"),),
    ),
    Chart("grad_norm", "Gradient norm", "Before clipping.", (("train/grad_norm", "norm"),), logarithmic=True),
    Chart("lr", "Learning rate", "As the schedule set it.", (("train/lr", "learning rate"),)),
)
PHASES = (
    ("perf/data_seconds", "data"),
    ("perf/rollout_seconds", "rollout"),
    ("perf/features_seconds", "features"),
    ("perf/reward_seconds", "reward"),
    ("perf/learn_seconds", "learn"),
    ("perf/update_seconds", "update"),
)
SHOWN_BLOCKS = 6
CONTEXT_CHARACTERS = 400


def write_run_report(output_dir: Path) -> Path:
    """Write `report.html` and its plots from the files of a run; whatever was not logged is left out.

    Args:
        output_dir: a run directory with `metrics.jsonl`; `samples.jsonl`, `config.resolved.yaml`,
            `environment.json` and `status.json` are shown where they exist.
    Returns:
        The page.
    Raises:
        InputError: a file is damaged.
    Communication: none.
    """
    by_key = curves(read_json_lines(output_dir / "metrics.jsonl"))
    plots = output_dir / "plots"
    sections = [
        _evaluation_section(by_key, output_dir, plots),
        _training_section(by_key, output_dir, plots),
        _samples_section(read_json_lines(output_dir / "samples.jsonl")),
        _facts_section(output_dir),
    ]
    path = output_dir / "report.html"
    content = page.page(f"Run {output_dir.name}", _subtitle(by_key), [part for part in sections if part])
    path.write_text(content, encoding="utf-8")
    return path


def _subtitle(by_key: Mapping[str, Curve]) -> str:
    steps = [curve[0][-1] for curve in by_key.values()]
    parts = [f"{max(steps)} optimizer steps" if steps else "no step was logged"]
    if "perf/step_seconds" in by_key:
        seconds = sorted(by_key["perf/step_seconds"][1])
        parts.append(f"median {seconds[len(seconds) // 2]:.2f} s per step")
    kind = "strided EBFT" if "ebft/alignment" in by_key else "cross-entropy only"
    return ", ".join([kind, *parts])


def _evaluation_section(by_key: Mapping[str, Curve], output_dir: Path, plots: Path) -> str:
    rows, figures = [], []
    for metric in EVALUATION_METRICS:
        if metric.key not in by_key:
            continue
        steps, values = by_key[metric.key]
        rows.append(
            [
                metric.label,
                metric.direction,
                f"{values[0]:.4f} (step {steps[0]})",
                f"{values[-1]:.4f} (step {steps[-1]})",
                f"{values[-1] - values[0]:+.4f}",
            ]
        )
        if len(steps) > 1:
            chart = Chart(metric.file_name, metric.label, metric.meaning, ((metric.key, metric.label),))
            image = plots / f"{metric.file_name}.png"
            draw_chart(chart, by_key, image)
            figures.append(page.figure(image, output_dir, metric.meaning))
    if not rows:
        return ""
    return "\n".join(
        [
            page.heading("Held-out rows"),
            page.table(["metric", "better", "first", "last", "change"], rows, num_text_columns=2),
            page.paragraph(
                "Fixed rows with common sampling noise, at the training temperature. A change here has no "
                "interval; see a comparison report for one.",
                soft=True,
            ),
            page.grid(figures),
        ]
    )


def _training_section(by_key: Mapping[str, Curve], output_dir: Path, plots: Path) -> str:
    figures = []
    for chart in TRAINING_CHARTS:
        image = plots / f"{chart.name}.png"
        if draw_chart(chart, by_key, image):
            figures.append(page.figure(image, output_dir, chart.caption))
    image = plots / "phases.png"
    if draw_phases(by_key, PHASES, "perf/step_seconds", image):
        figures.append(page.figure(image, output_dir, "Where the wall time of a step goes."))
    return page.heading("Training") + page.grid(figures) if figures else ""


def _samples_section(samples: Sequence[Mapping[str, Any]]) -> str:
    """The same blocks at the first and the last step that recorded any."""
    if not samples:
        return ""
    shown_steps = sorted({samples[0]["step"], samples[-1]["step"]})
    blocks: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for sample in samples:
        if sample["step"] in shown_steps:
            blocks.setdefault((sample["row"], sample["block"]), []).append(sample)
    # Blocks that were recorded at both steps come first: they show what the training changed.
    chosen = sorted(blocks.values(), key=len, reverse=True)[:SHOWN_BLOCKS]
    remark = page.paragraph(
        "The end of the context, the true continuation, and what the policy wrote instead; the number is the "
        "rollout's alignment.",
        soft=True,
    )
    return page.heading("Rollouts beside their targets") + remark + "\n".join(map(_block_card, chosen))


def _block_card(samples: Sequence[Mapping[str, Any]]) -> str:
    first = samples[0]
    context = first["context"]
    tail = context if len(context) <= CONTEXT_CHARACTERS else "… " + context[-CONTEXT_CHARACTERS:]
    rows = [f'<tr class="target"><td>target</td><td></td><td>{page.code(first["target"], "text")}</td></tr>']
    for sample in samples:
        for rollout, alignment in zip(sample["rollouts"], sample["alignment"], strict=True):
            rows.append(
                f'<tr><td>step {sample["step"]}</td><td class="number">{alignment:+.3f}</td>'
                f"<td>{page.code(rollout, 'text')}</td></tr>"
            )
    title = escape(f"row {first['row']}, block {first['block']}")
    return (
        f'<div class="card"><h3>{title}</h3>{page.code(tail, "context")}'
        f"<table><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _facts_section(output_dir: Path) -> str:
    parts = []
    status = output_dir / "status.json"
    if status.exists():
        parts.append(page.table(["outcome", ""], [[k, str(v)] for k, v in read_json(status).items()], 2))
    for name in (RESOLVED_CONFIG_NAME, ENVIRONMENT_NAME):
        path = output_dir / name
        if path.exists():
            parts.append(page.folded(name, path.read_text(encoding="utf-8")))
    return page.heading("The run") + "\n".join(parts) if parts else ""
