"""What a measurement of noise says: figures of every estimator as JSON and as a table."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ebft_mega.apps.noise.estimator_specs import EstimatorSpec, references
from ebft_mega.apps.noise.noise_figures import Figure, NoiseBootstrap
from ebft_mega.apps.noise.noise_measurement import Measured
from ebft_mega.apps.noise.noise_request import NoisePlan, NoiseRequest
from ebft_mega.apps.noise.variance_parts import Array, VarianceParts
from ebft_mega.cost.cost_table import aligned
from ebft_mega.cost.rollout_nodes import RolloutNodes
from ebft_mega.cost.step_cost import StepShape, cost_of_step
from ebft_mega.io.durable import write_json
from ebft_mega.planning.auto import default_choices

FILE_NAME, PROJECTIONS_NAME = "noise.json", "projections.npz"
FIGURES: dict[str, Callable[[VarianceParts], Array]] = {
    "within": lambda parts: parts.within,
    "between": lambda parts: parts.between,
    "total": lambda parts: parts.total,
    "share_between": lambda parts: parts.share_between,
    "signal": lambda parts: parts.signal,
    "critical_batch_rows": lambda parts: parts.critical_batch_rows,
}
EUCLIDEAN, ADAM = "euclidean", "adam"


def noise_report(request: NoiseRequest, plan: NoisePlan, measured: Measured, seed: int = 0) -> dict[str, Any]:
    """All figures, as they are written.

    Args:
        seed: of the resampling.
    """
    specs, reference = request.specs, references(request.specs)
    flops = [row_flops(spec, plan, nodes) for spec, nodes in zip(specs, measured.nodes, strict=True)]
    metrics = {EUCLIDEAN: NoiseBootstrap(measured.projections, seed)}
    if measured.scaled is not None:
        metrics[ADAM] = NoiseBootstrap(measured.scaled, seed)
    estimators = []
    for index, spec in enumerate(specs):
        compared, nodes = reference[index], measured.nodes[index]
        compute = flops[index] / flops[compared]
        found: dict[str, Any] = {
            "label": spec.label,
            "reference": specs[compared].label,
            "same_objective": spec.gradient == specs[compared].gradient,
            **spec.settings,
            "distinct_shares": asdict(nodes.shares(spec.config.block_plan)),
            "flops_per_row": flops[index],
            "compute_ratio": compute,
        }
        for name, bootstrap in metrics.items():
            found[name] = _figures(bootstrap, index, compared, compute)
            if request.by_token:
                found[name]["tokens"] = _tokens(bootstrap, request, spec)
        estimators.append(found)
    return {
        "model": str(request.model),
        "data": str(request.data),
        "rows": request.rows,
        "first_row": request.first_row,
        "replicates": request.replicates,
        "directions": request.directions,
        "warmup_batches": request.warmup_batches,
        "estimators": estimators,
    }


def row_flops(spec: EstimatorSpec, plan: NoisePlan, nodes: RolloutNodes) -> int:
    """Floating-point operations of a run's step for one row, as this trainer computes it, with the measured rollouts.

    Recomputation counts, with what `learn.reuse_rollout` chooses where the memory is not known; so does a token critic.
    """
    shape = StepShape.of(spec.config, plan.architecture, plan.feature_architecture, nodes)
    reuse = default_choices(spec.config).reuse_rollout
    return cost_of_step(shape, reuse, spec.config.train.activation_checkpointing == "full").total


def _figures(bootstrap: NoiseBootstrap, index: int, reference: int, compute: float) -> dict[str, Any]:
    figures: dict[str, Any] = {name: _written(bootstrap.figure(of, index)) for name, of in FIGURES.items()}
    for name in ("within", "total"):
        figures[f"{name}_ratio"] = _written(bootstrap.ratio(FIGURES[name], index, reference))
        at_equal_compute = bootstrap.ratio(FIGURES[name], index, reference, compute)
        figures[f"{name}_ratio_at_equal_compute"] = _written(at_equal_compute)
    if index != reference:
        test = bootstrap.mean_test(index, reference)
        figures["means"] = {
            "chi2_per_df": test.chi2_per_df,
            "bounds": [test.low, test.high],
            "p_value": test.p_value,
            "agree": test.agrees,
            "squared_difference_ratio": _written(test.squared_difference),
        }
    return figures


def _tokens(bootstrap: NoiseBootstrap, request: NoiseRequest, spec: EstimatorSpec) -> list[dict[str, Any]]:
    """Variance within rows of what each token adds, and its share of their sum."""
    places = [i for i, label in enumerate(request.labels) if label.startswith(f"{spec.label}/token=")]
    within = [bootstrap.figure(FIGURES["within"], place) for place in places]
    total = sum(figure.value for figure in within)
    return [{"within": _written(figure), "share": figure.value / total} for figure in within]


def _written(figure: Figure) -> dict[str, float | None]:
    """JSON has no number for infinity."""
    return {name: value if math.isfinite(value) else None for name, value in asdict(figure).items()}


def write_report(report: dict[str, Any], request: NoiseRequest, measured: Measured, output: Path) -> Path:
    """Write `noise.json` and `projections.npz`; returns the path of the first.

    The second holds `projections` and, for a model with second moments, `projections_adam`, float64 [estimator, row,
    replicate, direction], and `estimators`, the names along the first axis.
    """
    output.mkdir(parents=True, exist_ok=True)
    file, labels = output / PROJECTIONS_NAME, np.array(request.labels)
    if measured.scaled is None:
        np.savez(file, estimators=labels, projections=measured.projections)
    else:
        np.savez(file, estimators=labels, projections=measured.projections, projections_adam=measured.scaled)
    path = output / FILE_NAME
    write_json(path, report)
    return path


def table_lines(report: dict[str, Any], metric: str) -> list[str]:
    """A line for every estimator: against its reference, within rows and in all, at equal rows and at equal compute."""
    head = (
        "",
        "within",
        "within / ref",
        "total / ref",
        "at equal compute",
        "share between",
        "critical rows",
        "chi2/df",
    )
    rows: list[Sequence[str]] = [head]
    for found in report["estimators"]:
        figures = found[metric]
        means = figures.get("means")
        chi2 = (
            "" if means is None else f"{means['chi2_per_df']:.2f} [{means['bounds'][0]:.2f}, {means['bounds'][1]:.2f}]"
        )
        rows.append(
            (
                found["label"],
                f"{figures['within']['value']:.3g}",
                *(_shown(figures[name]) for name in ("within_ratio", "total_ratio", "total_ratio_at_equal_compute")),
                _shown(figures["share_between"]),
                _shown(figures["critical_batch_rows"]),
                chi2,
            )
        )
    return aligned(rows)


def _shown(figure: dict[str, float | None]) -> str:
    value, low, high = ("-" if figure[name] is None else f"{figure[name]:.3g}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
