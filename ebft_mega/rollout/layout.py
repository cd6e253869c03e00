"""Between rollouts as the algorithm counts them, `[B, n, K, G]`, and as a pass lays them out, block-major.

Block-major order (block, then sample, then token) puts rollouts that share a prefix side by side.
"""

import torch
from torch import Tensor

from ebft_mega.rollout.plan import BlockPlan


def to_sequence(rollouts: Tensor) -> Tensor:
    """Flatten rollouts into a pass's sequence.

    Args:
        rollouts: [B, n, K, T].
    Returns:
        [B, K * n * T], block-major.
    """
    return rollouts.transpose(1, 2).flatten(1)


def from_sequence(values: Tensor, plan: BlockPlan) -> Tensor:
    """The inverse of `to_sequence`.

    Args:
        values: [B, K * n * T].
    Returns:
        [B, n, K, T].
    """
    return values.unflatten(1, (plan.num_blocks, plan.num_samples, -1)).transpose(1, 2)


def generated_positions(plan: BlockPlan, first: int, count: int, device: torch.device) -> Tensor:
    """Rotary positions of tokens `first .. first + count - 1` of every rollout, block-major.

    A generated token has the position of the target token it stands for, `anchor + t`.

    Returns:
        int64 [K * n * count].
    """
    anchors = torch.tensor(plan.anchors, device=device).repeat_interleave(plan.num_samples)
    return (anchors[:, None] + torch.arange(first, first + count, device=device)).flatten()


def packed_sequence(tokens: Tensor, rollouts: Tensor, plan: BlockPlan) -> tuple[Tensor, Tensor]:
    """A document prefix followed by rollouts, with rotary positions.

    Args:
        tokens: int64 [B, S], the first S tokens of each row.
        rollouts: int64 [B, n, K, T], the first T tokens of each rollout.
    Returns:
        Tokens int64 [B, S + R * T] and positions int64 [S + R * T].
    """
    document_positions = torch.arange(tokens.shape[1], device=tokens.device)
    positions = generated_positions(plan, 0, rollouts.shape[3], tokens.device)
    return torch.cat((tokens, to_sequence(rollouts)), dim=1), torch.cat((document_positions, positions))
