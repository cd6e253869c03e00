"""The memory formulas against real steps of sliced, staged and divided models: bytes of live tensors on every rank."""

import dataclasses
from pathlib import Path

import torch

from ebft_mega.config.memory import Choices, plan_memory
from ebft_mega.config.validate import ParallelSizes
from ebft_mega.parallel.groups import connect, make_process_groups
from ebft_mega.train.step import train_step
from ebft_mega.types import TokenBatch
from tests.distributed.steps import Layout
from tests.unit.test_memory_measured import PHASES, measured, planned, rows_of, started


def compare(layout: Layout, cases: tuple[tuple[str, tuple[str, ...]], ...], directory: str):
    """Predicted and measured bytes of each phase, by case."""
    groups = make_process_groups(connect(), layout.tensor, layout.pipeline)
    sizes = ParallelSizes(layout.tensor, layout.pipeline, layout.data)
    found = []
    for reuse, overrides in cases:
        own = Path(directory) / f"rank{torch.distributed.get_rank()}"
        own.mkdir(exist_ok=True)
        config, plan = planned(own, (*layout.overrides, f"learn.reuse_rollout={reuse}", *overrides))
        plan = dataclasses.replace(plan, parallel=sizes, num_micro_batches=plan.num_micro_batches // layout.data)
        memory = plan_memory(config, plan, Choices(reuse, config.zero.feature_network=="sharded"), groups.pipeline_rank)
        trainer = started(config, plan, groups, reuse)
        batch = rows_of(config)
        local = slice(
            len(batch.tokens) * groups.data_parallel_rank // layout.data,
            len(batch.tokens) * (groups.data_parallel_rank + 1) // layout.data,
        )
        batch = TokenBatch(batch.tokens[local], batch.document_ids[local], batch.row_indices[local])
        _, _, peaks = measured(lambda: train_step(trainer, batch, 1, 1e-3))
        found.append(({phase: memory.phase_bytes(phase) for phase in PHASES}, peaks))
        print(found[-1], memory.phases)
    return found
