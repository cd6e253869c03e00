"""Masks that exclude rows and blocks from the loss: filler in the place of rows, blocks across documents."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ebft_mega.block_plan import BlockPlan
from ebft_mega.config.schema import RunConfig
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.rollout.packed_order import counted_blocks
from ebft_mega.types import TokenBatch


@dataclass(frozen=True)
class LossMasks:
    """Which rows and blocks of this replica's micro-batches count, and how many do over the global batch."""

    rows: tuple[Tensor, ...]  # per micro-batch bool [B], false for filler
    blocks: tuple[Tensor, ...]  # per micro-batch bool [B, K], see `counted_blocks`
    num_rows: int
    num_blocks: int


def loss_masks(
    micro_batches: Sequence[TokenBatch], plan: BlockPlan, config: RunConfig, groups: ProcessGroups
) -> LossMasks | None:
    """The masks of a step; None if by the configuration all rows and blocks count.

    Raises:
        ValueError: `data.document_masking` is set, and the rows were made without.
    Communication: none if everything counts; else one all-reduce of two int64 over the data-parallel group, for which
        the host waits: both are denominators of losses and metrics.
    """
    if config.data.document_masking and any(rows.documents is None for rows in micro_batches):
        raise ValueError("data.document_masking needs rows with masked documents (TokenBatch.with_document_masking)")
    # Without rollouts there are no blocks, and document masking drops nothing else.
    drops_blocks = config.data.document_masking and config.uses_rollouts
    if not drops_blocks and config.data.on_error != "skip" and not config.data.skip_rows:
        return None
    rows = tuple(batch.row_indices >= 0 for batch in micro_batches)
    blocks = tuple(counted_blocks(batch, plan) for batch in micro_batches)
    sums = [torch.stack([part.sum() for part in parts]).sum() for parts in (rows, blocks)]
    counts = torch.stack(sums)
    dist.all_reduce(counts, group=groups.data_parallel)
    num_rows, num_blocks = counts.tolist()
    return LossMasks(rows, blocks, num_rows, num_blocks)
