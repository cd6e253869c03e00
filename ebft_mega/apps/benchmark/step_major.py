"""The packed sequence of the naive baseline: a row, then token 0 of every block, then token 1 of every block, ...

The existing EBFT trainers pack like this. There is one sequence per sample, so documents are repeated; attention is
dense, and a mask hides the positions that a token must not see.
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ebft_mega.block_plan import BlockPlan

DenseKernel = Literal["eager", "sdpa"]


@dataclass(frozen=True)
class DenseLayout:
    """Dense attention over step-major sequences; passed to every layer in place of an attention mask."""

    mask: Tensor  # [S, S], added to scores: 0 or the dtype's most negative number
    kernel: DenseKernel

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of one layer over all pairs of positions.

        `eager` is what the existing trainers run (their masks have four dimensions, which flash kernels refuse): all
        scores, the mask added, a float32 softmax, all weights times values. `sdpa` gives torch's kernel the mask.

        Args:
            layer: not used.
            query: [S, B, heads, d]; key, value: [S, B, groups, d].
        Returns:
            [S, B, heads * d].
        Communication: none.
        """
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        if self.kernel == "sdpa":
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask, enable_gqa=True)
        else:
            sharers = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(sharers, dim=1), value.repeat_interleave(sharers, dim=1)
            scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + self.mask
            out = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value
        return out.permute(2, 0, 1, 3).flatten(2)


@functools.lru_cache(maxsize=32)
def dense_layout(
    plan: BlockPlan, tokens_per_block: int, kernel: DenseKernel, dtype: torch.dtype, device: torch.device
) -> DenseLayout:
    """Make the layout of a row and the first `tokens_per_block` tokens of each block; the mask is built once.

    Row tokens see themselves and all earlier ones of the row. A generated token sees the row before its block's
    anchor, itself and the tokens before it in its own block.
    """
    blocks = torch.arange(plan.num_blocks, device=device).repeat(tokens_per_block)
    row = torch.arange(plan.sequence_length, device=device)
    anchors = torch.tensor(plan.anchors, device=device)
    index = torch.arange(len(row) + len(blocks), device=device)
    owner = torch.cat((torch.full_like(row, -1), blocks))  # the block of a position; -1: the row
    visible = torch.cat((row + 1, anchors[blocks]))  # how much of the row a position sees
    sees_row = (owner == -1) & (index < visible[:, None])
    sees_own = (owner != -1) & (owner == owner[:, None]) & (index <= index[:, None])
    mask = torch.zeros(len(index), len(index), dtype=dtype, device=device)
    return DenseLayout(mask.masked_fill_(~(sees_row | sees_own), torch.finfo(dtype).min), kernel)


def step_major_sequence(tokens: Tensor, rollouts: Tensor, plan: BlockPlan) -> tuple[Tensor, Tensor]:
    """Repeat rows for every sample, each followed by its sample's tokens, and give their rotary positions.

    Args:
        tokens: int64 [B, P]; rollouts: int64 [B, n, K, T].
    Returns:
        Tokens int64 [B * n, P + T * K] and positions int64 [P + T * K].
    """
    copies = tokens.repeat_interleave(plan.num_samples, dim=0)
    generated = rollouts.transpose(2, 3).flatten(2).flatten(0, 1)  # [B * n, T * K]
    anchors = torch.tensor(plan.anchors, device=tokens.device)
    steps = torch.arange(rollouts.shape[3], device=tokens.device)
    positions = torch.cat(
        (torch.arange(plan.sequence_length, device=tokens.device), (steps[:, None] + anchors).flatten())
    )
    return torch.cat((copies, generated), dim=1), positions


def predicting_positions(plan: BlockPlan, device: torch.device) -> Tensor:
    """Return the positions of a step-major sequence at which each generated token is predicted.

    Token 0 of a block is predicted by the row's token before the anchor, token t by the block's token t - 1, which is
    K places back.

    Returns:
        int64 [K, G].
    """
    anchors = torch.tensor(plan.anchors, device=device)[:, None] - 1
    earlier = plan.num_blocks * torch.arange(plan.generate_length - 1, device=device)
    blocks = torch.arange(plan.num_blocks, device=device)[:, None]
    return torch.cat((anchors, plan.sequence_length + earlier + blocks), dim=1)


def feature_positions(plan: BlockPlan, window: range, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the positions at which features are read.

    Args:
        window: T positions of each window of G (`FeatureMap.positions`).
    Returns:
        int64 [K, T] each, of generated tokens in a step-major sequence and of targets in the row.
    """
    steps = torch.tensor(window, device=device)
    blocks = torch.arange(plan.num_blocks, device=device)[:, None]
    generated = plan.sequence_length + steps * plan.num_blocks + blocks
    return generated, torch.tensor(plan.anchors, device=device)[:, None] + steps
