"""The memory formulas against real steps at tensor, pipeline and ZeRO layouts: bytes of live tensors on every rank."""

import dataclasses
from pathlib import Path

import pytest
import torch.distributed as dist

from ebft_mega.parallel.groups import connect, make_process_groups
from ebft_mega.planning.memory import plan_memory
from ebft_mega.planning.run_plan import ParallelSizes
from ebft_mega.train.step import train_step
from tests.distributed.planning.real_memory import measure
from tests.distributed.ranks import run_ranks
from tests.distributed.steps import Layout
from tests.unit.planning.test_memory_measured import PHASES, chosen, measured, planned, rows_of, started

ONE_ROW = ("train.micro_batch_size=1",)  # four micro-batches
# Data-parallel ranks with whole parameters: what DeepSpeed's buffers need besides is not in the formulas.
STEP = ("zero.hold_parameters=step",)


def compare(layout: Layout, cases: tuple[tuple[str, tuple[str, ...]], ...], directory: str):
    """Predicted and measured bytes of each phase on this rank, by case."""
    groups = make_process_groups(connect(), layout.tensor, layout.pipeline)
    own = Path(directory) / f"rank-{dist.get_rank()}"
    own.mkdir()
    found = []
    for reuse, overrides in cases:
        config, plan = planned(own, (*layout.overrides, f"learn.reuse_rollout={reuse}", *overrides))
        sizes = ParallelSizes(layout.tensor, layout.pipeline, layout.data)
        plan = dataclasses.replace(plan, parallel=sizes, num_micro_batches=plan.num_micro_batches // layout.data)
        memory = plan_memory(config, plan, chosen(reuse), groups.pipeline_rank)
        trainer = started(config, plan, groups, reuse)
        batch = rows_of(config).split(config.train.global_batch_size // layout.data)[groups.data_parallel_rank]
        _, _, peaks = measured(lambda trainer=trainer, batch=batch: train_step(trainer, batch, 1, 1e-3))
        found.append(({phase: memory.phase_bytes(phase) for phase in PHASES}, peaks))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "cases"),
    [
        (Layout(1, 1, 2, 0), (("off", ONE_ROW), ("checkpoints", ONE_ROW), ("activations", ONE_ROW))),
        (Layout(1, 2, 1, 0), (("checkpoints", ()), ("activations", ()))),
        (Layout(2, 1, 1, 3), (("activations", STEP),)),
    ],
    ids=["two-stages", "two-slices", "two-replicas"],
)
def test_every_rank_needs_what_the_formulas_say(layout, cases, tmp_path):
    for rank, results in enumerate(run_ranks(layout.world_size, compare, layout, cases, str(tmp_path))):
        for (reuse, _), (predicted, found) in zip(cases, results, strict=True):
            shares = {phase: predicted[phase] / found[phase] for phase in PHASES}
            print(rank, reuse, {phase: f"{share:.3f}" for phase, share in shares.items()})
            # Blocks that a communication thread gives back count as held until their address is used again: with
            # gathers of parameters the measured peak is a few percent too high in some runs.
            least = 0.9 if layout.data == 1 else 0.85
            for phase in ("rollout", "features", "learn"):
                assert shares[phase] >= least, (rank, reuse, phase)
            # A stage may have the deepest tapped layer alone, which is smaller than the whole one that is counted.
            for phase in ("rollout", "learn"):
                assert shares[phase] <= 1.12, (rank, reuse, phase)


@pytest.mark.slow
@pytest.mark.parametrize("millions", [50, 250])
@pytest.mark.parametrize("degrees", [(1, 1), (2, 1), (1, 2)], ids=["one-rank", "two-replicas", "two-slices"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_real_job_needs_what_the_plan_says(stage, degrees, millions, tmp_path):
    """In bfloat16, states included, of the rank that needs the most: the plan is the same for all replicas."""
    layout = Layout(*degrees, 1, stage)
    arguments = (layout, millions, ("learn.reuse_rollout=checkpoints",), str(tmp_path), True)
    found = run_ranks(layout.world_size, measure, *arguments)
    for phase in PHASES:
        most = max(memory.live[phase] for memory in found)
        print(phase, f"planned {found[0].planned[phase] / 1e6:.0f} MB, needed {most / 1e6:.0f} MB")
        assert found[0].planned[phase] == pytest.approx(most, rel=0.1), phase
