"""Find rollouts of a block that are equal token by token, and give them equal inner products.

Under whitening, equality is all that the diversity term can see, and it must be exact: rounding that differs
between two equal rollouts (another tile of a kernel, another row of a batch) would count them as two
directions. So equality is decided by token ids, and equal rollouts are given one set of inner products.
"""

import torch
from torch import Tensor

from ebft_mega.forest import first_equal
from ebft_mega.reward.marked_blocks import finite_blocks, mark_blocks


def copy_duplicate_rows(gram: Tensor, rollouts: Tensor) -> Tensor:
    """Give equal rollouts of a block the inner products of the first of them.

    Args:
        gram: float64 [B, K, n + 1, n + 1], samples first, the target last.
        rollouts: int64 [B, n, K, G].
    Returns:
        float64 [B, K, n + 1, n + 1], symmetric to the last bit; rows and columns of equal rollouts are the
        same, and their inner product with each other is that of the first with itself. A block with a value that is
        not finite is marked, also where that is the feature of a rollout that takes over the first one's.
    Communication: none.
    Source: the authors' code rewards equality of features; here equal tokens are made to have them.
    """
    first = first_equal(rollouts.transpose(1, 2))  # [B, K, n]
    target = torch.full_like(first[..., :1], first.shape[-1])
    index = torch.cat((first, target), dim=-1)
    symmetric = (gram + gram.transpose(-1, -2)) / 2
    rows = symmetric.gather(-2, index[..., :, None].expand_as(gram))
    copied = rows.gather(-1, index[..., None, :].expand_as(gram))
    return mark_blocks(copied, finite_blocks(gram))


def has_duplicates(rollouts: Tensor) -> Tensor:
    """Of every block whether two or more of its rollouts are equal.

    Args:
        rollouts: int64 [B, n, K, G].
    Returns:
        bool [B, K].
    Communication: none.
    """
    first = first_equal(rollouts.transpose(1, 2))
    return (first != torch.arange(first.shape[-1], device=first.device)).any(dim=-1)


def duplicate_share_per_row(rollouts: Tensor) -> Tensor:
    """Share of a row's blocks in which two or more rollouts are equal.

    Args:
        rollouts: int64 [B, n, K, G].
    Returns:
        float64 [B], in [0, 1].
    Communication: none.
    """
    return has_duplicates(rollouts).to(torch.float64).mean(dim=-1)


def duplicate_share(rollouts: Tensor) -> Tensor:
    """Share of all blocks in which two or more rollouts are equal.

    Args:
        rollouts: int64 [B, n, K, G].
    Returns:
        float64 [], in [0, 1].
    Communication: none.
    """
    return duplicate_share_per_row(rollouts).mean()
