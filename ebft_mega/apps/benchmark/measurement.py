"""Measure all sides of a case in turns, and write counts, times and memory as one entry of the bench file."""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ebft_mega.apps.benchmark.case import BenchCase, BenchModel
from ebft_mega.apps.benchmark.counting import ProductCounter, count_phase
from ebft_mega.apps.benchmark.peak_memory import peak_bytes_in_child
from ebft_mega.apps.benchmark.product_speed import product_flops_per_second
from ebft_mega.apps.benchmark.sides import (
    COUNTERPARTS,
    NAIVE_SIDES,
    OUR_SIDES,
    Side,
    StepDone,
    build_sides,
    sum_of_rows,
)
from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.cost.mfu import model_flops_utilisation, peak_flops
from ebft_mega.cost.rollout_nodes import DistinctShares, RolloutNodes
from ebft_mega.cost.step_cost import StepShape, least_cost_of_step
from ebft_mega.cost.work import Flops, PhaseCost, StepCost
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.types import DTYPES

# Timed phases, and the phases of `StepCost` that run in each.
PHASES: dict[str, tuple[str, ...]] = {
    "rollout": ("generate",),
    "features": ("features",),
    "reward": (),
    "learn": ("policy_forward", "policy_backward"),
    "update": ("update",),
}


@dataclasses.dataclass
class Timing:
    """Seconds of the runs of one side."""

    wall: list[float] = dataclasses.field(default_factory=list)
    processor: list[float] = dataclasses.field(default_factory=list)  # of this process alone: less disturbed by others
    phases: dict[str, list[float]] = dataclasses.field(default_factory=lambda: {phase: [] for phase in PHASES})


def compare(
    case: BenchCase,
    sides: Sequence[str],
    model: BenchModel,
    groups: ProcessGroups,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Count, time and measure the sides of one case.

    Every side first runs one step whose matrix products are counted. Then they run in turns, so that other load on the
    machine affects all of them alike; before and after, the machine multiplies matrices of the model's sizes. Memory is
    measured afterwards, each side in its own process.

    Args:
        sides: names of `sides.NAIVE_SIDES` and `sides.OUR_SIDES`.
        groups: of a job of one process.
        say: called with progress messages.
    Returns:
        The case's entry of the bench file.
    Raises:
        RuntimeError: the matrix products of a side are not those of its formulas.
    """
    architecture = model.architecture
    timings = {name: Timing() for name in sides}
    done: dict[str, StepDone] = {}
    built = build_sides(sides, case, model, groups)
    for name, side in built.items():
        side.warm_up()
        done[name] = check_counts(side, architecture)
        say(f"{case.name} {name}: counts are those of the formulas, gradient norm {done[name].grad_norm:.6g}")
    speeds = [product_flops_per_second(architecture, DTYPES[model.dtype], groups.device)]
    for run in range(case.runs):
        for name, side in built.items():
            time_step(side, run, timings[name])
            say(f"{case.name} {name}: run {run + 1} of {case.runs}, {timings[name].wall[-1]:.2f} s")
    speeds.append(product_flops_per_second(architecture, DTYPES[model.dtype], groups.device))
    costs = {name: side.cost(done[name]) for name, side in built.items()}
    del built, side
    gc.collect()
    peaks = {}
    for name in sides:
        peaks[name] = peak_bytes_in_child(name, case, model)
        say(f"{case.name} {name}: peak {peaks[name] / 1e6:.0f} MB")
    nodes = {name: step.nodes for name, step in done.items()}
    found = entry(case, model, costs, timings, peaks, device_peak(model, groups.device), nodes)
    for name, step in done.items():
        found[name]["grad_norm"] = step.grad_norm
    speed = statistics.mean(speeds)
    for name in sides:
        seconds = found[name]["seconds_median" if groups.device.type == "cuda" else "cpu_seconds_median"]
        found[name]["share_of_product_speed"] = found[name]["flops"] / seconds / speed if seconds else None
    found["product_flops_per_second"] = speeds
    return found


def check_counts(side: Side, architecture: Architecture) -> StepDone:
    """Run one step and compare its matrix products with the side's formulas, for the forest that it sampled.

    Where rollouts that begin alike are merged, rows are also compared with those of the bound for this forest: no row
    of the rollout and of the features is computed that it does not have. Only where windows overlap does the head draw
    from a document's row once for each of several anchors; the bound does so once.

    Raises:
        RuntimeError: they differ.
    """
    side.timers.reset()
    with ProductCounter(side.timers, side.table) as counter:
        done = side.run(0)
    cost, bound = side.cost(done), sum_of_rows(least_cost_of_step, side.shape, done.nodes)
    for phase, parts in PHASES.items():
        expected = [cost.phases[part] for part in parts]
        samples = side.shape.plan.num_samples if side.shape.critic else None
        counted = count_phase(counter.products, phase, architecture, samples)
        flops = sum((part.flops + part.recomputed for part in expected), Flops())
        if (counted.linear_flops, counted.head_flops) != (flops.linear, flops.head):
            raise RuntimeError(
                f"{side.name} did {counted.linear_flops} FLOPs in linear layers and {counted.head_flops} in the head "
                f"in the phase {phase}; the formulas say {flops.linear} and {flops.head}"
            )
        rounding = len(done.nodes) if phase == "update" else 0  # of each row's share of what a step solves
        if not 0 <= counted.critic_flops - flops.critic <= rounding:
            raise RuntimeError(
                f"{side.name} did {counted.critic_flops} FLOPs for the token critic in the phase {phase}; the formulas "
                f"say {flops.critic}"
            )
        if side.merges and phase in ("rollout", "features"):
            least, plan = bound.phases[parts[0]], side.shape.plan
            repeats = plan.stride < plan.generate_length and counted.head_rows > least.head_rows
            if counted.layer_rows > least.rows * least.layers or counted.head_rows != least.head_rows and not repeats:
                raise RuntimeError(
                    f"{side.name} computed {counted.layer_rows} rows of layers and {counted.head_rows} of the head in "
                    f"the phase {phase}; the bound with merging has {least.rows * least.layers} and {least.head_rows}"
                )
    return done


def time_step(side: Side, step: int, timing: Timing) -> None:
    """Run one step and add its times."""
    side.timers.reset()
    gc.collect()
    processor, wall = time.process_time(), time.perf_counter()
    side.run(step)
    timing.wall.append(time.perf_counter() - wall)
    timing.processor.append(time.process_time() - processor)
    for phase, seconds in timing.phases.items():
        seconds.append(side.timers.seconds()[phase])


def entry(
    case: BenchCase,
    model: BenchModel,
    costs: Mapping[str, StepCost],
    timings: Mapping[str, Timing],
    peaks: Mapping[str, int],
    peak_flops_per_device: float | None = None,
    nodes: Mapping[str, Sequence[RolloutNodes]] | None = None,
) -> dict[str, Any]:
    """Make a case's entry of the bench file.

    Args:
        peak_flops_per_device: of the device that was timed; None leaves `mfu` empty.
        nodes: of each row's rollouts, of the sides that have run.
    """
    architecture = model.architecture
    config = case.config(model, "off")
    plan, shape = config.block_plan, StepShape.of(config, architecture, architecture)
    different = RolloutNodes.all_different(plan)
    bound = sum_of_rows(least_cost_of_step, shape, [different] * case.rows)
    of_sides = {name: _side_entry(cost, timings.get(name), peaks.get(name)) for name, cost in costs.items()}
    for name, side in of_sides.items():
        seconds, counted = side["seconds_median"], (nodes or {}).get(name, [different] * case.rows)
        side["rollout_tokens_per_second"] = case.rows * plan.generated_per_row / seconds if seconds else None
        # `mfu` is what the side needs by the counts of this trainer; the other numerator is the same for all sides.
        mean, side["mfu"], side["mfu_without_merging"] = RolloutNodes.mean(counted), None, None
        if seconds and peak_flops_per_device:
            sizes = config, architecture, architecture, seconds, 1, peak_flops_per_device
            side["mfu"], side["mfu_without_merging"] = (
                model_flops_utilisation(*sizes, numerator) for numerator in (mean, None)
            )
        shares: DistinctShares = mean.shares(plan)
        side["distinct_shares"] = dataclasses.asdict(shares)
        if name in OUR_SIDES and OUR_SIDES[name].merges:
            of_side = case.config(model, "off", estimator=OUR_SIDES[name].estimator)
            least = sum_of_rows(least_cost_of_step, StepShape.of(of_side, architecture, architecture), counted)
            side["bound_with_merging"] = {"flops": least.total, "phases": _phase_entries(least)}
    return {
        "name": case.name,
        "sequence_length": case.sequence_length,
        "samples": case.samples,
        "stride": case.stride,
        "generate_max_len": case.generate_length,
        "temperature": case.temperature,
        "rows": case.rows,
        **of_sides,
        "bound": {"flops": bound.total, "phases": _phase_entries(bound)},
        "ratios": ratios(of_sides, bound.total),
    }


def device_peak(model: BenchModel, device: torch.device) -> float | None:
    """Dense peak of the device in FLOPs per second; None for CPUs and unknown ones."""
    return peak_flops(torch.cuda.get_device_name(device), model.dtype) if device.type == "cuda" else None


def ratios(sides: Mapping[str, Mapping[str, Any]], bound_flops: int) -> dict[str, float]:
    """Medians, peaks and counts of this trainer over the baseline's and over its own without merging (without the token
    critic), and to bounds.
    """
    found = {f"flops {name} / bound": side["flops"] / bound_flops for name, side in sides.items()}
    for ours, side in sides.items():
        if "bound_with_merging" in side:
            found[f"flops {ours} / bound with merging"] = side["flops"] / side["bound_with_merging"]["flops"]
        for other in {*NAIVE_SIDES, COUNTERPARTS[ours]} & set(sides) if ours in OUR_SIDES else ():
            for what, key in (("seconds", "seconds_median"), ("cpu", "cpu_seconds_median"), ("peak", "peak_bytes")):
                if side[key] is not None and sides[other][key] is not None:
                    found[f"{what} {ours} / {other}"] = side[key] / sides[other][key]
            found[f"flops {ours} / {other}"] = side["flops"] / sides[other]["flops"]
    return dict(sorted(found.items()))


def _side_entry(cost: StepCost, timing: Timing | None, peak_bytes: int | None) -> dict[str, Any]:
    timed = timing or Timing()
    return {
        "rows_generate": cost.generate.rows,
        "head_rows_generate": cost.generate.head_rows,
        "rows_features": cost.features.rows,
        "feature_layers_run": cost.features.layers,
        "rows_policy_forward": cost.policy_forward.rows,
        "flops": cost.total,
        "critic_flops": cost.critic,
        "seconds_median": _median(timed.wall),
        "seconds_all": timed.wall,
        "cpu_seconds_median": _median(timed.processor),
        "cpu_seconds_all": timed.processor,
        "phase_seconds_median": {phase: _median(seconds) for phase, seconds in timed.phases.items()},
        "phase_seconds_all": timed.phases,
        "peak_bytes": peak_bytes,
        "phases": _phase_entries(cost),
    }


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _phase_entries(cost: StepCost) -> dict[str, dict[str, Any]]:
    return {name: _phase_entry(phase) for name, phase in cost.phases.items()}


def _phase_entry(phase: PhaseCost) -> dict[str, Any]:
    return {
        "rows": phase.rows,
        "layers": phase.layers,
        "head_rows": phase.head_rows,
        "pairs": phase.pairs,
        "flops": phase.total,
        "linear_flops": phase.flops.linear,
        "head_flops": phase.flops.head,
        "attention_flops": phase.flops.attention,
        "critic_flops": phase.flops.critic,
        "recomputed_flops": phase.recomputed.total,
    }
