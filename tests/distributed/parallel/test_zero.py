"""Every ZeRO stage on every axis takes the steps of plain torch, and what is not finite anywhere is skipped everywhere.

What each workaround is for is in `test_zero_traps.py`.
"""

import math
from dataclasses import dataclass
from functools import cache

import pytest
import torch
import torch.distributed as dist

from ebft_mega.parallel.groups import ProcessGroups, connect, make_process_groups
from ebft_mega.parallel.zero import ZeroEngine
from tests.distributed.parallel.zero_stages import (
    LEARNING_RATE,
    Projection,
    Truth,
    accumulate,
    farthest,
    plain_steps,
    settings,
    tiny_engine,
)
from tests.distributed.ranks import run_ranks

NUM_STEPS = 3
STAGES = (0, 1, 2, 3)
CLIP = 2.1  # clips two of the steps: Adam would not notice a factor that is the same in all
LAYOUTS = {"data": (2, 1, 1), "tensor": (2, 2, 1), "pipeline": (2, 1, 2)}  # ranks, tensor, pipeline
MANY = {
    "padded data": (4, 1, 1),  # the smallest parameter has two elements
    "three stages": (3, 1, 3),
    "tensor x pipeline": (4, 2, 2),
    "data x tensor x pipeline": (8, 2, 2),
}


DROPPED_STEP = 1  # its gradient is once shown and forgotten before it is computed again and used


@dataclass
class Found:
    """What the steps of an engine came to."""

    norms: list[float]
    projections: list[float]  # of the gradients that the engine shows
    dropped: float  # of that of `DROPPED_STEP`, when no update follows
    distance: float  # of the master weights from plain torch's


def take_steps(groups: ProcessGroups, **options) -> Found:
    options = settings(**options)
    engine = tiny_engine(groups, options)
    found = Found([], [], 0.0, 0.0)
    for step in range(NUM_STEPS):
        if step == DROPPED_STEP:
            accumulate(engine, groups, step)
            dropped = Projection(engine, groups)
            engine.drop_gradient(dropped.look)
            found.dropped = dropped.total()
        accumulate(engine, groups, step)
        projection = Projection(engine, groups)
        update = engine.step(LEARNING_RATE, projection.look)
        assert update.applied
        found.norms.append(update.grad_norm)
        found.projections.append(projection.total())
    found.distance = farthest(engine, groups, plain_steps(groups, NUM_STEPS, options.grad_clip))
    return found


def take_all_steps(tensor: int, pipeline: int) -> dict[str, Found]:
    groups = make_process_groups(connect(), tensor, pipeline)
    found = {f"zero {stage}": take_steps(groups, zero_stage=stage, grad_clip=CLIP) for stage in STAGES}
    found |= {
        f"bf16 {stage}": take_steps(groups, zero_stage=stage, dtype=torch.bfloat16, grad_clip=CLIP) for stage in STAGES
    }
    found["no clipping 0"] = take_steps(groups, zero_stage=0, grad_clip=0.0)
    found["no clipping 2"] = take_steps(groups, zero_stage=2, grad_clip=0.0)
    found["no clipping 3"] = take_steps(groups, zero_stage=3, grad_clip=0.0)
    found["hold step"] = take_steps(groups, hold="step", grad_clip=CLIP)
    return found


@cache
def steps_of(layout: str) -> list[dict[str, Found]]:
    return run_ranks((LAYOUTS | MANY)[layout][0], take_all_steps, *(LAYOUTS | MANY)[layout][1:])


@cache
def truth(grad_clip: float) -> Truth:
    return run_ranks(1, plain_truth, grad_clip)[0]


def plain_truth(grad_clip: float) -> Truth:
    return plain_steps(make_process_groups(connect()), NUM_STEPS, grad_clip)


every_layout = pytest.mark.parametrize(
    "layout",
    ["data", *(pytest.param(layout, marks=pytest.mark.slow) for layout in (*LAYOUTS, *MANY) if layout != "data")],
)


@every_layout
def test_steps_are_those_of_plain_torch(layout):
    clipped, free = truth(CLIP), truth(0.0)
    name = "blocks.0.up.weight"
    assert (clipped.parameters[name] - free.parameters[name]).abs().max() > 1e-4  # so a wrong clipping is seen
    for rank, found in enumerate(steps_of(layout)):
        for name, outcome in found.items():
            if name.startswith("bf16"):
                continue
            expected = free if name.startswith("no clipping") else clipped
            assert outcome.norms == pytest.approx(expected.norms, rel=1e-5), (rank, name)
            assert outcome.distance < 2e-6, (rank, name)
            # Their own rounding is that of the norm, which they may be far below.
            shown = [*outcome.projections, outcome.dropped]
            truths = [*expected.projections, expected.projections[DROPPED_STEP]]
            assert shown == pytest.approx(truths, rel=0, abs=1e-5 * min(expected.norms)), (rank, name)


@every_layout
def test_bfloat16_gradients_are_added_up_in_float32_at_every_stage(layout):
    first = steps_of(layout)[0]["bf16 0"]
    assert first.norms == pytest.approx(truth(CLIP).norms, rel=2e-2)
    assert first.projections == pytest.approx(truth(CLIP).projections, rel=0, abs=2e-2 * max(first.norms))
    for rank, found in enumerate(steps_of(layout)):
        for stage in STAGES:
            outcome = found[f"bf16 {stage}"]
            assert outcome.norms == pytest.approx(first.norms, rel=1e-6), (rank, stage)
            assert outcome.projections == pytest.approx(first.projections, rel=0, abs=1e-6), (rank, stage)
            assert outcome.dropped == pytest.approx(first.projections[DROPPED_STEP], rel=0, abs=1e-6), (rank, stage)
            assert outcome.distance < NUM_STEPS * 2 * LEARNING_RATE, (rank, stage)


POISONED = {1: "out_bias", 3: "down.weight", 5: "embedding.weight"}  # parameter by step; every other step is healthy
LARGE = 1e30  # what it makes of a gradient is finite, its square in float32 is not


def take_poisoned_steps(tensor: int, pipeline: int) -> dict[str, tuple[list[bool], float, float]]:
    """In some steps one parameter's gradient is NaN on the last rank alone, or too large for its square."""
    groups = make_process_groups(connect(), tensor, pipeline)
    found = {}
    cases = [(stage, "float32", 0.0 if stage % 2 else CLIP, math.nan) for stage in STAGES]
    cases += [(stage, "bfloat16", 0.0 if stage % 2 else CLIP, math.nan) for stage in (1, 2, 3)]
    cases += [(stage, "float32", 0.0, LARGE) for stage in STAGES]
    for stage, dtype, clip, factor in cases:
        options = settings(zero_stage=stage, dtype=getattr(torch, dtype), grad_clip=clip)
        engine = tiny_engine(groups, options)
        updates = []
        for step in range(7):
            handles = poison(engine, groups, POISONED[step], factor) if step in POISONED else []
            accumulate(engine, groups, step)
            for handle in handles:
                handle.remove()
            updates.append(engine.step(LEARNING_RATE))
        distance = farthest(engine, groups, plain_steps(groups, 7, options.grad_clip, skipped=tuple(POISONED)))
        found[f"zero {stage} {dtype} {clip} {factor}"] = (
            [update.applied for update in updates],
            updates[1].grad_norm,
            distance,
        )
    return found


def poison(engine: ZeroEngine, groups: ProcessGroups, name: str, factor: float) -> list:
    """`out_bias` is counted by tensor-parallel rank 0 alone, the tied embedding by the first stage alone."""
    if dist.get_rank() != dist.get_world_size() - 1:
        return []
    if groups.pipeline_size > 1:
        name = name.replace("embedding", "head")
    parameters = [parameter for key, parameter in engine.module.named_parameters() if name in key]
    return [parameters[-1].register_hook(lambda gradient: gradient * factor)]


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[] if name == "pipeline" else pytest.mark.slow) for name in LAYOUTS]
)
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(layout):
    """Also one that no norm counts. Weights and Adam's state stay: the next step is that of a run without this one."""
    ranks, tensor, pipeline = LAYOUTS[layout]
    for rank, found in enumerate(run_ranks(ranks, take_poisoned_steps, tensor, pipeline)):
        for name, (applied, poisoned_norm, distance) in found.items():
            assert applied == [step not in POISONED for step in range(7)], (rank, name)
            assert poisoned_norm == float("inf"), (rank, name)
            assert distance < (5e-6 if "float32" in name else 4 * LEARNING_RATE), (rank, name)
