"""The list of benchmark cases, and running all of them into one bench file."""

import dataclasses
import itertools
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ebft_mega.apps.benchmark.case import MODELS, BenchCase, BenchModel
from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.cost.naive_cost import cost_of_naive_step
from ebft_mega.cost.rollout_nodes import DistinctShares, RolloutNodes
from ebft_mega.cost.step_cost import StepShape, cost_of_step, least_cost_of_step
from ebft_mega.cost.work import StepCost

OURS_ALONE = ("ours", "ours_activations")
# The n and stride cases vary the first one. The baseline is left out at the longest row, where it would take minutes.
CASES = (
    BenchCase("L256", 256),
    BenchCase("L512", 512, runs=3),
    BenchCase("L1024", 1024, runs=3, sides=("naive", "naive_checkpointing", "naive_sdpa", *OURS_ALONE)),
    BenchCase("L2048", 2048, runs=3, sides=OURS_ALONE),
    BenchCase("n2", 256, samples=2, runs=3),
    BenchCase("n8", 256, samples=8, runs=3),
    BenchCase("s4", 256, stride=4, runs=3),
    BenchCase("s16", 256, stride=16, runs=3),
)
QUICK_CASES = (BenchCase("L64", 64, runs=1, sides=("naive", "ours")),)
LARGE_LENGTHS = (1024, 4096)
# By n: those of a 260k-parameter model pretrained on TinyStories at G = 8 and temperature 0.6
# (docs/choosing-samples.md). What a large model's are is to be measured.
GIVEN_SHARES = {4: DistinctShares(0.722, 0.691, 0.749), 8: DistinctShares(0.653, 0.617, 0.650)}


def run_suite(cases: Sequence[BenchCase], model: BenchModel, say: Callable[[str], None]) -> dict[str, Any]:
    """Compare the sides of every case on a model, and count the FLOPs of a 7B model, which is not run.

    Returns:
        The contents of the bench file.
    """
    import torch

    from ebft_mega.apps.benchmark.measurement import compare
    from ebft_mega.parallel.groups import connect, make_process_groups

    torch.set_num_threads(1)
    groups = make_process_groups(connect())
    return {
        "cases": [compare(case, case.sides, model, groups, say) for case in cases],
        "model": dataclasses.asdict(model),
        "large_model": large_model_costs(),
        "environment": {
            "device": torch.cuda.get_device_name() if groups.device.type == "cuda" else _processor_name(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def large_model_costs() -> dict[str, dict[str, Any]]:
    """FLOPs of a 7B model by row length and side: total, per phase, and as a multiple of the bound."""
    architecture = MODELS["7b"].architecture
    found = {}
    for length in LARGE_LENGTHS:
        plan = BenchCase("", length).config(MODELS["7b"], "off").block_plan
        shape = StepShape(architecture, architecture, plan)
        bound = least_cost_of_step(shape)
        costs: dict[str, StepCost] = {
            "naive": cost_of_naive_step(shape),
            "naive, checkpointing": cost_of_naive_step(shape, checkpoints_layers=True),
            "ours, reuse off": cost_of_step(shape, "off"),
            "ours, reuse off, checkpointing": cost_of_step(shape, "off", checkpoints_layers=True),
            "ours, checkpoints": cost_of_step(shape, "checkpoints"),
            "ours, activations": cost_of_step(shape, "activations"),
            "bound": bound,
        }
        found[str(length)] = {
            name: {
                "flops": cost.total,
                "times_bound": cost.total / bound.total,
                "phases": {phase: counted.total for phase, counted in cost.phases.items()},
            }
            for name, cost in costs.items()
        }
    return found


def merged_costs(models: Mapping[str, Architecture]) -> list[dict[str, Any]]:
    """FLOPs of a row of the recipes' geometry with and without merging, for `GIVEN_SHARES`; nothing is run."""
    found = []
    for (name, architecture), samples in itertools.product(models.items(), GIVEN_SHARES):
        plan = BenchCase("", LARGE_LENGTHS[0], samples).config(MODELS["7b"], "off").block_plan
        shape = StepShape(architecture, architecture, plan, uses_targets=True)
        merged = shape.with_nodes(RolloutNodes.of_shares(plan, GIVEN_SHARES[samples]))
        for reuse in ("checkpoints", "activations"):
            found.append(
                {
                    "model": name,
                    "samples": samples,
                    "reuse": reuse,
                    "flops": cost_of_step(shape, reuse).total,
                    "flops_merged": cost_of_step(merged, reuse).total,
                    "bound_merged": least_cost_of_step(merged).total,
                }
            )
    return found


def _processor_name() -> str:
    """The CPU's model name, or the machine type where the system has no /proc/cpuinfo."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()
