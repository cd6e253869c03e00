"""Masks that exclude from the loss: filler in the place of rows, blocks across documents, documents' first tokens."""

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
    # Per micro-batch bool [B, P - 1], false for filler and where the next token is a document's first; None: as `rows`.
    targets: tuple[Tensor, ...] | None = None
    num_targets: int | None = None  # of the global batch

    def of(self, index: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows, blocks and next-token positions of one micro-batch that count."""
        return self.rows[index], self.blocks[index], None if self.targets is None else self.targets[index]


def loss_masks(
    micro_batches: Sequence[TokenBatch], plan: BlockPlan, config: RunConfig, groups: ProcessGroups
) -> LossMasks | None:
    """The masks of a step; None if by the configuration all rows and blocks count.

    Raises:
        ValueError: `data.document_masking` is set, and the rows were made without.
    Communication: none if everything counts; else one all-reduce of two or three int64 over the data-parallel group,
        for which the host waits: they are denominators of losses and metrics.
    """
    if config.data.document_masking and any(rows.documents is None for rows in micro_batches):
        raise ValueError("data.document_masking needs rows with masked documents (TokenBatch.with_document_masking)")
    # Without rollouts there are no blocks, and document masking drops nothing else.
    drops_blocks = config.data.document_masking and config.uses_rollouts
    drops_targets = not config.data.train_on_first_token and config.uses_targets
    if not drops_blocks and not drops_targets and config.data.on_error != "skip" and not config.data.skip_rows:
        return None
    rows = tuple(batch.row_indices >= 0 for batch in micro_batches)
    blocks = tuple(counted_blocks(batch, plan) for batch in micro_batches)
    targets = tuple(counted_targets(batch) for batch in micro_batches) if drops_targets else None
    masks = (rows, blocks) if targets is None else (rows, blocks, targets)
    counts = torch.stack([torch.stack([part.sum() for part in parts]).sum() for parts in masks])
    dist.all_reduce(counts, group=groups.data_parallel)
    num_rows, num_blocks, *num_targets = counts.tolist()
    return LossMasks(rows, blocks, num_rows, num_blocks, targets, next(iter(num_targets), None))


def counted_targets(rows: TokenBatch) -> Tensor:
    """Mask of the next-token positions that count where the first tokens of documents do not.

    Returns:
        bool [B, P - 1]; entry p is of the prediction of token p + 1, as in `PolicyLogprobs.target`.
    """
    ids = rows.document_ids
    return (rows.row_indices >= 0)[:, None] & (ids[:, 1:] == ids[:, :-1])
