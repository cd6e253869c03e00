"""Marked blocks: those in which something was not finite. A block's mark is a Gram matrix that is NaN throughout.

A value that is not finite must neither raise (a decomposition does, of all blocks together) nor be lost: equal
rollouts take over the first one's features, a comparison with NaN is merely false, and tokens are integers. So every
operation that could raise on it or hide it marks the block instead. In a step the reward of a marked block is NaN,
and all ranks skip the step (`objective/guard.py`); an evaluation leaves the block out and says so.
"""

import torch
from torch import Tensor


def finite_blocks(gram: Tensor) -> Tensor:
    """Which blocks are not marked.

    Args:
        gram: [B, K, m, m].
    Returns:
        bool [B, K], true where every inner product is finite.
    Communication: none, and nothing waits for the device.
    """
    return gram.isfinite().all(dim=-1).all(dim=-1)


def mark_blocks(gram: Tensor, finite: Tensor) -> Tensor:
    """Make the Gram matrices of some blocks NaN throughout; the others stay bit for bit.

    Args:
        gram: [B, K, m, m].
        finite: bool [B, K], false where a block is to be marked.
    Communication: none.
    """
    return gram.masked_fill(~finite[..., None, None], torch.nan)
