"""Between rollouts as the algorithm counts them, `[B, n, K, G]`, and as a pass lays them out, token-major.

A pass is the document, then token 0 of every rollout, then token 1 of every rollout, and so on; that is the order in
which decoding makes them, so the passes of a decode, one behind the other, are the packed pass. Among themselves the
rollouts of a row are block-major (block, then sample).
"""

import torch
from torch import Tensor

from ebft_mega.rollout.plan import BlockPlan


def to_sequence(rollouts: Tensor) -> Tensor:
    """Flatten rollouts into a pass's sequence.

    Args:
        rollouts: [B, n, K, T].
    Returns:
        [B, T * K * n], token-major.
    """
    return rollouts.permute(0, 3, 2, 1).flatten(1)


def from_sequence(values: Tensor, plan: BlockPlan) -> Tensor:
    """The inverse of `to_sequence`.

    Args:
        values: [B, T * K * n].
    Returns:
        [B, n, K, T].
    """
    return values.unflatten(1, (-1, plan.num_blocks, plan.num_samples)).permute(0, 3, 2, 1)


def anchor_positions(plan: BlockPlan, device: torch.device) -> Tensor:
    """The plan's anchors, int64 [K], made where they are used: a copy from the host would wait for the device."""
    return torch.arange(plan.num_blocks, device=device) * plan.stride + plan.context_length


def generated_positions(plan: BlockPlan, first: int, count: int, device: torch.device) -> Tensor:
    """Rotary positions of tokens `first .. first + count - 1` of every rollout, token-major.

    A generated token has the position of the target token it stands for, `anchor + t`.

    Returns:
        int64 [count * K * n].
    """
    # [K, n] without `repeat_interleave`, for the same reason
    anchors = anchor_positions(plan, device)[:, None].expand(-1, plan.num_samples).flatten()
    return (torch.arange(first, first + count, device=device)[:, None] + anchors).flatten()


def packed_positions(plan: BlockPlan, document_length: int, tokens_per_rollout: int, device: torch.device) -> Tensor:
    """Rotary positions of a document prefix and the first tokens of every rollout: int64 [S]."""
    document = torch.arange(document_length, device=device)
    return torch.cat((document, generated_positions(plan, 0, tokens_per_rollout, device)))


def packed_sequence(tokens: Tensor, rollouts: Tensor, plan: BlockPlan) -> tuple[Tensor, Tensor]:
    """A document prefix followed by rollouts, with rotary positions.

    Args:
        tokens: int64 [B, D], the first D tokens of each row.
        rollouts: int64 [B, n, K, T], the first T tokens of each rollout.
    Returns:
        Tokens int64 [B, D + T * R] and positions int64 [D + T * R].
    """
    positions = packed_positions(plan, tokens.shape[1], rollouts.shape[3], tokens.device)
    return torch.cat((tokens, to_sequence(rollouts)), dim=1), positions
