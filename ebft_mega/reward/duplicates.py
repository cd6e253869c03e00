"""Rollouts with equal tokens: found by their ids, given equal features."""

import torch
from torch import Tensor


def first_equal(rollouts: Tensor) -> Tensor:
    """The first sample of each block that has the same tokens.

    Args:
        rollouts: int64 [B, n, K, G].
    Returns:
        int64 [B, K, n]; j for a rollout that no earlier one equals.
    """
    by_block = rollouts.transpose(1, 2)  # [B, K, n, G]
    equal = (by_block[:, :, :, None] == by_block[:, :, None, :]).all(dim=-1)  # [B, K, n, n]
    return equal.to(torch.uint8).argmax(dim=-1)


def copy_duplicate_rows(gram: Tensor, rollouts: Tensor) -> Tensor:
    """Give rollouts with equal tokens bitwise equal rows and columns.

    The diversity term under whitening sees nothing but exact duplicates, and different rows of one kernel may round
    one rollout differently.

    Args:
        gram: float64 [B, K, n + 1, n + 1]; rollouts: int64 [B, n, K, G].
    Returns:
        float64 [B, K, n + 1, n + 1], symmetric.
    Communication: none.
    """
    first = first_equal(rollouts)
    target = first.new_full((*first.shape[:2], 1), first.shape[2])
    source = torch.cat((first, target), dim=2)  # [B, K, n + 1]
    size = gram.shape[-1]
    rows = gram.gather(2, source[..., :, None].expand(-1, -1, -1, size))
    return rows.gather(3, source[..., None, :].expand(-1, -1, size, -1))


def duplicate_share_per_row(rollouts: Tensor) -> Tensor:
    """Share of a row's blocks with two or more equal rollouts, float64 [B], from int64 [B, n, K, G]."""
    first = first_equal(rollouts)
    own = torch.arange(first.shape[2], device=first.device)
    return (first != own).any(dim=-1).to(torch.float64).mean(dim=-1)


def duplicate_share(rollouts: Tensor) -> Tensor:
    """Share of all blocks with two or more equal rollouts, float64 []."""
    return duplicate_share_per_row(rollouts).mean()
