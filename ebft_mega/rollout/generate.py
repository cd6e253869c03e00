"""Strided block-parallel generation: one pass over the document, then one token of every rollout per pass."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ebft_mega.config.schema import RunConfig
from ebft_mega.model.attention import KeyValueCache, StridedLayout
from ebft_mega.model.stage import Stage
from ebft_mega.rollout.layout import generated_positions
from ebft_mega.rollout.noise import noise_keys
from ebft_mega.rollout.plan import BlockPlan
from ebft_mega.rollout.sampling import sample_tokens
from ebft_mega.types import Rollout, TokenBatch


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn, in training and in evaluation."""

    seed: int
    temperature: float
    top_p: float

    @classmethod
    def of(cls, config: RunConfig) -> "SamplingSettings":
        """The sampling of a run."""
        return cls(config.seed, config.ebft.temperature, config.ebft.top_p)


@torch.no_grad()
def generate_rollouts(
    policy: Stage, batch: TokenBatch, plan: BlockPlan, sampling: SamplingSettings, step: int
) -> Rollout:
    """Sample n continuations of G tokens from every anchor of every row.

    The document prefix is processed once; its keys and values serve all samples. The first token comes from the
    logits at `anchor - 1`, so G tokens cost one document pass and G - 1 decode passes of K * n rows.

    Args:
        policy: a stage that holds the whole model, with whole parameters (no engine hooks).
        step: optimizer step, part of the sampling noise.
    Returns:
        Rollout; tokens are a pure function of (weights, row, seed, step, row index, sample, block, token index).
    Communication: that of the policy's layers.
    Source: EBFT paper (arXiv 2603.12248), strided mode.
    """
    device = batch.tokens.device
    cache = KeyValueCache()

    def draw(logits: Tensor, token_index: int) -> Tensor:
        """One token for every rollout from logits [B, n or 1, K, V]."""
        keys = noise_keys(sampling.seed, step, batch.row_indices, plan.num_samples, plan.num_blocks, token_index)
        return sample_tokens(logits, keys, sampling.temperature, sampling.top_p)

    prefix = plan.anchors[-1]  # the last block's context; nothing of the row beyond it is read
    layout = StridedLayout.of(plan, device, document_length=prefix, tokens_per_rollout=0, cache=cache)
    positions = torch.arange(prefix, device=device)
    hidden, _ = policy.hidden_states(batch.tokens[:, :prefix], positions, layout)
    before_anchors = hidden[torch.tensor(plan.anchors, device=device) - 1]  # [K, B, H]
    logits = policy.logits(before_anchors.transpose(0, 1).flatten(0, 1))
    logits = logits.view(-1, 1, plan.num_blocks, logits.shape[-1])
    generated = [draw(logits, 0)]  # int64 [B, n, K] each

    layout = StridedLayout.of(plan, device, document_length=0, tokens_per_rollout=1, cache=cache)
    for token_index in range(1, plan.generate_length):
        previous = generated[-1].transpose(1, 2).flatten(1)  # [B, R]
        positions = generated_positions(plan, token_index - 1, 1, device)
        hidden, _ = policy.hidden_states(previous, positions, layout)  # [R, B, H]
        logits = policy.logits(hidden.transpose(0, 1).flatten(0, 1))
        logits = logits.view(-1, plan.num_blocks, plan.num_samples, logits.shape[-1])
        generated.append(draw(logits.transpose(1, 2), token_index))
    return Rollout(torch.stack(generated, dim=-1))
