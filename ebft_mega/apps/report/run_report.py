"""The page of one run: curves, held-out metrics, rollouts beside their targets, configuration and environment."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebft_mega.apps.report.metric_names import EVALUATION_METRICS
from ebft_mega.apps.report.page import Figure, Table, write_page
from ebft_mega.apps.report.plots import Chart, draw_chart, draw_phases
from ebft_mega.apps.report.run_records import Curve, curves, read_good_lines, read_json
from ebft_mega.apps.report.run_story import checkpoints_table, run_facts, warnings_table
from ebft_mega.metrics.metric_keys import term_key, terms_among
from ebft_mega.runtime.run_files import (
    ENVIRONMENT_NAME,
    METRICS_NAME,
    REPORT_NAME,
    RESOLVED_CONFIG_NAME,
    SAMPLES_NAME,
    STATUS_NAME,
)

logger = logging.getLogger(__name__)

TRAINING_CHARTS = (
    Chart(
        "loss",
        "Training loss",
        "What the optimizer minimises, and the cross-entropy on the same rows (nats per token).",
        (("train/loss", "loss"), ("ebft/ce_loss", "cross-entropy")),
    ),
    Chart(
        "entropy",
        "Entropy of the next token",
        "On the same rows, at temperature 1 (nats per token); the loss subtracts it, times `ebft.entropy_coef`.",
        (("train/entropy", "entropy"),),
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
LEFT_OUT = (("eval/blocks_left_out", "blocks"), ("eval/rows_left_out", "rows' cross-entropies"))
PLOTS_NAME = "plots"
NO_TABLE = Table([], [])
SHOWN_BLOCKS = 6
CONTEXT_CHARACTERS = 400


def write_run_report(output_dir: Path) -> Path:
    """Write `report.html` and its plots from the files of a run; whatever was not logged is left out.

    What is damaged or cannot be drawn is left out, too, and the page says so.

    Args:
        output_dir: a run directory with `metrics.jsonl`; `samples.jsonl`, `notes.jsonl`, `data_errors.jsonl`,
            `checkpoints/`, `config.resolved.yaml`, `environment.json` and `status.json` are shown where they exist.
    Returns:
        The page.
    Raises:
        OSError: the page cannot be written.
    Communication: none.
    """
    metrics, damages = read_good_lines(output_dir / METRICS_NAME)
    samples, more = read_good_lines(output_dir / SAMPLES_NAME)
    by_key = curves(metrics)
    path = output_dir / REPORT_NAME
    lacking = [*damages, *more, *_left_out(by_key)]

    def attempt(make: Callable[[], object], otherwise: object) -> object:
        try:
            return make()
        except Exception as error:  # of any kind: no part of the page is worth losing the rest
            lacking.append(f"a part of this page could not be made: {type(error).__name__}: {error}")
            return otherwise

    outcome: dict[str, str] = {}
    attempt(lambda: outcome.update(_outcome(output_dir / STATUS_NAME)), None)
    files = [output_dir / name for name in (RESOLVED_CONFIG_NAME, ENVIRONMENT_NAME)]
    parts: dict[str, Any] = {
        "title": f"Run {output_dir.name}",
        "subtitle": attempt(lambda: _subtitle(by_key), ""),
        "evaluation": attempt(lambda: _evaluation_table(by_key), NO_TABLE),
        "evaluation_figures": attempt(lambda: _evaluation_figures(by_key, output_dir), []),
        "training_figures": attempt(lambda: _training_figures(by_key, output_dir), []),
        "facts": attempt(lambda: run_facts(output_dir, by_key), []),
        "warnings": attempt(lambda: warnings_table(output_dir, by_key), NO_TABLE),
        "checkpoints": attempt(lambda: checkpoints_table(output_dir), NO_TABLE),
        "blocks": attempt(lambda: _sampled_blocks(samples), []),
        "files": attempt(lambda: {file.name: file.read_text(encoding="utf-8") for file in files if file.exists()}, {}),
    }
    rows = [*map(list, outcome.items()), *(["lacking", text] for text in lacking)]
    write_page(path, "run.html", outcome=Table(["outcome", ""], rows, num_text_columns=2), **parts)
    for text in lacking:
        logger.warning("%s: %s", path, text)
    return path


def _left_out(by_key: Mapping[str, Curve]) -> list[str]:
    """What evaluations have left out, by step."""
    return [
        f"evaluation of step {step}: {count:.0f} {what} were left out, because something was not finite"
        for key, what in LEFT_OUT
        for step, count in zip(*by_key.get(key, ([], [])), strict=True)
        if count
    ]


def _outcome(status: Path) -> dict[str, str]:
    """What `status.json` says, if there is one: the page of a run is made before its outcome is recorded."""
    return {key: str(value) for key, value in read_json(status).items()} if status.exists() else {}


def _subtitle(by_key: Mapping[str, Curve]) -> str:
    steps = [curve[0][-1] for curve in by_key.values()]
    parts = [f"{max(steps)} optimizer steps" if steps else "no step was logged"]
    if "perf/step_seconds" in by_key:
        seconds = sorted(by_key["perf/step_seconds"][1])
        parts.append(f"median {seconds[len(seconds) // 2]:.2f} s per step")
    # The share of duplicates is finite also where nothing else is.
    kind = "strided EBFT" if by_key.keys() & {"ebft/alignment", "ebft/duplicate_share"} else "cross-entropy only"
    return ", ".join([kind, *parts])


def _evaluation_table(by_key: Mapping[str, Curve]) -> Table:
    """First and last value of every held-out metric that was logged."""
    rows = []
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
    return Table(["metric", "better", "first", "last", "change"], rows, num_text_columns=2)


def _evaluation_figures(by_key: Mapping[str, Curve], output_dir: Path) -> list[Figure]:
    """Curves of the held-out metrics that were logged more than once."""
    charts = [
        Chart(metric.file_name, metric.label, metric.meaning, ((metric.key, metric.label),))
        for metric in EVALUATION_METRICS
        if metric.key in by_key and len(by_key[metric.key][0]) > 1
    ]
    return _drawn(charts, by_key, output_dir)


def _training_figures(by_key: Mapping[str, Curve], output_dir: Path) -> list[Figure]:
    figures = _drawn([*TRAINING_CHARTS, *_charts_of_further_terms(by_key)], by_key, output_dir)
    image = output_dir / PLOTS_NAME / "phases.png"
    if draw_phases(by_key, PHASES, "perf/step_seconds", image):
        figures.append(Figure.of(image, "Where the wall time of a step goes."))
    return figures


def _charts_of_further_terms(by_key: Mapping[str, Curve]) -> list[Chart]:
    """One for each term of `ebft.reward_terms`, which are of different scales."""
    drawn = {key for chart in TRAINING_CHARTS for key, _ in chart.series}
    caption = "Mean over the rollouts, without the term's coefficient."
    names = [name for name in terms_among(by_key) if term_key(name) not in drawn]
    return [Chart(f"term_{name}", f"Reward term {name}", caption, ((term_key(name), name),)) for name in names]


def _drawn(charts: Sequence[Chart], by_key: Mapping[str, Curve], output_dir: Path) -> list[Figure]:
    """Draw the charts of which at least one curve was logged."""
    images = {chart: output_dir / PLOTS_NAME / f"{chart.name}.png" for chart in charts}
    return [Figure.of(image, chart.caption) for chart, image in images.items() if draw_chart(chart, by_key, image)]


@dataclass(frozen=True)
class _Rollout:
    """A rollout as the page shows it."""

    step: int
    alignment: str
    text: str


@dataclass(frozen=True)
class _SampledBlock:
    """A block as the page shows it, with its rollouts of one or two steps."""

    title: str
    context: str  # its end, where it is long
    target: str
    rollouts: tuple[_Rollout, ...]

    @classmethod
    def of(cls, samples: Sequence[Mapping[str, Any]]) -> "_SampledBlock":
        """One block from its records in `samples.jsonl`, one of each step."""
        first = samples[0]
        context = first["context"]
        return cls(
            title=f"row {first['row']}, block {first['block']}",
            context=context if len(context) <= CONTEXT_CHARACTERS else "… " + context[-CONTEXT_CHARACTERS:],
            target=first["target"],
            rollouts=tuple(
                _Rollout(sample["step"], f"{alignment:+.3f}", text)
                for sample in samples
                for text, alignment in zip(sample["rollouts"], sample["alignment"], strict=True)
            ),
        )


def _sampled_blocks(samples: Sequence[Mapping[str, Any]]) -> list[_SampledBlock]:
    """The same blocks at the first and at the last step with recorded samples."""
    if not samples:
        return []
    shown_steps = sorted({samples[0]["step"], samples[-1]["step"]})
    blocks: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for sample in samples:
        if sample["step"] in shown_steps:
            blocks.setdefault((sample["row"], sample["block"]), []).append(sample)
    # Blocks that were recorded at both steps come first: they show what the training changed.
    chosen = sorted(blocks.values(), key=len, reverse=True)[:SHOWN_BLOCKS]
    return [_SampledBlock.of(block) for block in chosen]
