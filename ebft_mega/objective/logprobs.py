"""Log-probabilities of chosen tokens, from logits that may be spread over tensor-parallel ranks."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ebft_mega.parallel.vocabulary import VocabularyShard


def selected_logprobs(logits: Tensor, tokens: Tensor, temperature: float, shard: VocabularyShard) -> Tensor:
    """Log-probability of chosen tokens under the softmax at a temperature.

    Args:
        logits: [..., width], this rank's columns, any float dtype.
        tokens: int64 [..., m], m choices from each row of logits, ids in [0, V), the same on all ranks.
        temperature: > 0; that of the sampling for rollouts, 1 for targets. Tokens that a nucleus left out are
            scored by the full softmax, too.
    Returns:
        float32 [..., m] (float64 for float64 logits), the same on all ranks. The gradient reaches this rank's
        columns alone and is exactly 0 for padding. Every rank computes the same loss from the result, so each
        rank's own upstream gradient is the whole one: nothing is summed over the ranks in backward.
    Communication: with several tensor-parallel ranks two all-reduces in forward, of 4 and of 4 * (1 + m) bytes per
        row of logits (8 and 8 * (1 + m) for float64); none in backward, none for one rank.
    Memory: nothing of the logits' size is kept for backward but the logits themselves. Forward and backward each
        hold one more array of that size in float32 for a while.
    Source: EBFT paper (arXiv 2603.12248); the authors' code scores at the sampling temperature, in float32.
    """
    assert logits.shape[-1] == shard.width, "logits of another vocabulary"
    logprobs: Tensor = _SelectedLogprobs.apply(logits, tokens, temperature, shard)
    return logprobs


class _SelectedLogprobs(torch.autograd.Function):
    """The softmax is computed again in backward: saving it would cost as much memory as the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float, shard: VocabularyShard) -> Tensor:
        scaled = _scaled(logits, temperature, shard)
        largest = shard.maximum(scaled.amax(dim=-1, keepdim=True))
        scaled -= largest
        column, is_own = _own_column(tokens, shard)
        # A token has a finite logit on one rank; the others add 0 and leave its bits alone.
        chosen = scaled.gather(-1, column).masked_fill(~is_own, 0.0)
        parts = torch.cat((scaled.exp_().sum(dim=-1, keepdim=True), chosen), dim=-1)
        mass, chosen = shard.sum(parts).split((1, tokens.shape[-1]), dim=-1)
        ctx.save_for_backward(logits, tokens, largest, mass)
        ctx.temperature, ctx.shard = temperature, shard
        return chosen - mass.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        logits, tokens, largest, mass = ctx.saved_tensors
        column, is_own = _own_column(tokens, ctx.shard)
        result = _scaled(logits, ctx.temperature, ctx.shard).sub_(largest).exp_()  # the softmax times `mass`
        result *= -gradient.sum(dim=-1, keepdim=True) / mass
        result.scatter_add_(-1, column, gradient.masked_fill(~is_own, 0.0))
        return result.div_(ctx.temperature).to(logits.dtype), None, None, None


def _scaled(logits: Tensor, temperature: float, shard: VocabularyShard) -> Tensor:
    """A copy of the logits at a temperature, without padding."""
    # Cast before the division: bfloat16 has 8 bits of mantissa, a rounded logit of 30 is off by a tenth.
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return shard.exclude_padding_(logits.to(dtype) / temperature)


def _own_column(tokens: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """Each token's column on this rank (any column if it is another rank's), and whether it is this rank's."""
    column = tokens - shard.first
    is_own = (column >= 0) & (column < shard.num_tokens)
    return column.clamp(0, shard.width - 1), is_own
