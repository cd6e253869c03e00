"""The strided attention mask as one dense matrix, and the positions that go with it.

This is the definition in its plainest form, the reference that the attention of `model.attention` is tested
against; at production size the matrix would be three quarters empty, and nothing in a run builds it.
"""

import torch
from torch import Tensor

from ebft_mega.block_plan import BlockPlan


def strided_mask(plan: BlockPlan, num_samples: int | None = None, tokens_per_block: int | None = None) -> Tensor:
    """Which position of the packed sequence may attend to which.

    The sequence is the row's P tokens, then token t of rollout r = k * n + j (sample j of block k) at
    `P + t * R + r`. Row tokens see themselves and what is before them in the row; a generated token sees the row
    before its block's anchor (the whole prefix, not a window), itself and what is before it in its own rollout.

    Args:
        num_samples: n; the plan's by default.
        tokens_per_block: T, generated tokens of each rollout so far; G by default, 0 is the row alone.
    Returns:
        bool [F, F], F = P + K * n * T; True where query (row) may attend to key (column).
    Communication: none.
    Source: EBFT paper (arXiv 2603.12248), strided mode; the authors' mask builder.
    """
    num_samples = plan.num_samples if num_samples is None else num_samples
    per_block = plan.generate_length if tokens_per_block is None else tokens_per_block
    row = torch.arange(plan.sequence_length)
    rollout = torch.arange(plan.num_blocks * num_samples).repeat(per_block)
    anchors = torch.tensor(plan.anchors).repeat_interleave(num_samples)
    index = torch.arange(len(row) + len(rollout))
    owner = torch.cat((torch.full_like(row, -1), rollout))  # which rollout a position belongs to; -1: the row
    visible = torch.cat((row + 1, anchors[rollout]))  # how much of the row a query sees
    sees_row = (owner == -1) & (index < visible[:, None])
    sees_own = (owner != -1) & (owner == owner[:, None]) & (index <= index[:, None])
    return sees_row | sees_own


def packed_positions(plan: BlockPlan, tokens_per_block: int | None = None) -> Tensor:
    """Rotary positions of the packed sequence: a generated token has that of the target token it stands for.

    Args:
        tokens_per_block: T, generated tokens of each rollout; G by default.
    Returns:
        int64 [P + K * n * T].
    Communication: none.
    """
    per_block = plan.generate_length if tokens_per_block is None else tokens_per_block
    anchors = torch.tensor(plan.anchors).repeat_interleave(plan.num_samples)
    generated = torch.arange(per_block)[:, None] + anchors
    return torch.cat((torch.arange(plan.sequence_length), generated.flatten()))
