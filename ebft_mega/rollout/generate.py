"""Strided block-parallel generation: one pass over the document, then one token of every rollout per pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ebft_mega.config.schema import RunConfig
from ebft_mega.model.attention import KeyValueCache, StridedLayout
from ebft_mega.model.stage import PipelinedModel, Stage
from ebft_mega.parallel.pipeline import Slot, run_ring, share_from_last_stage
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
    model: PipelinedModel,
    micro_batches: Sequence[TokenBatch],
    plan: BlockPlan,
    sampling: SamplingSettings,
    step: int,
) -> list[Rollout]:
    """Sample n continuations of G tokens from every anchor of every row.

    The document prefix is processed once; its keys and values serve all samples. The first token comes from the
    logits at `anchor - 1`, so G tokens cost one document pass and G - 1 decode passes of K * n rows. Pipeline
    stages work on different micro-batches at the same time; nothing is flushed between passes.

    Args:
        model: the policy with whole parameters.
        step: optimizer step, part of the sampling noise.
    Returns:
        Rollout per micro-batch, the same on every rank of the replica; tokens are a pure function of (weights,
        row, seed, step, row index, sample, block, token index).
    Communication: that of the layers and of `sample_tokens`; along the pipeline hidden states, the tokens of
        each pass back to the first stage, and one broadcast of all tokens.
    Source: EBFT paper (arXiv 2603.12248), strided mode.
    """
    decoding = _Decoding(model, micro_batches, plan, sampling, step)
    run_ring(
        model.groups,
        len(micro_batches),
        decoding.run,
        decoding.hidden_buffer,
        num_passes=plan.generate_length,
        returned_buffer=decoding.tokens_buffer,
    )
    shapes = [(len(batch.tokens), plan.num_samples, plan.num_blocks, plan.generate_length) for batch in micro_batches]
    drawn = [torch.stack(tokens, dim=-1) if tokens else torch.empty(0) for tokens in decoding.drawn]
    return [Rollout(tokens) for tokens in share_from_last_stage(drawn, shapes, torch.int64, model.groups)]


class _Decoding:
    """The policy's work in the ring: pass 0 reads the document, pass t feeds back token t - 1 of every rollout."""

    def __init__(
        self,
        model: PipelinedModel,
        micro_batches: Sequence[TokenBatch],
        plan: BlockPlan,
        sampling: SamplingSettings,
        step: int,
    ):
        self.model, self.micro_batches, self.plan = model, micro_batches, plan
        self.sampling, self.step = sampling, step
        self.caches: dict[int, KeyValueCache] = {}  # of the micro-batches that are under way
        self.drawn: list[list[Tensor]] = [[] for _ in micro_batches]  # last stage: [B, n, K] per token

    def run(self, slot: Slot, received: Tensor | None) -> Tensor:
        """One pass of one micro-batch through this stage."""
        if slot.pass_index == 0:
            self.caches[slot.micro_batch] = KeyValueCache()
        output: Tensor = self.model.run(lambda stage: self._pass(stage, slot, received))
        if slot.pass_index == self.plan.generate_length - 1:
            del self.caches[slot.micro_batch]
        return output

    def _pass(self, stage: Stage, slot: Slot, received: Tensor | None) -> Tensor:
        plan, batch = self.plan, self.micro_batches[slot.micro_batch]
        device, is_document = batch.tokens.device, slot.pass_index == 0
        prefix = plan.anchors[-1]  # the last block's context; nothing of the row beyond it is read
        if is_document:
            positions = torch.arange(prefix, device=device)
        else:
            positions = generated_positions(plan, slot.pass_index - 1, 1, device)
        layout = StridedLayout.of(
            plan,
            device,
            document_length=prefix if is_document else 0,
            tokens_per_rollout=0 if is_document else 1,
            cache=self.caches[slot.micro_batch],
        )
        if received is None:
            entering = batch.tokens[:, :prefix]
        elif stage.shape.has_embedding:
            entering = received.transpose(1, 2).flatten(1)  # the tokens before, [B, n, K] -> [B, R]
        else:
            entering = received
        hidden, _ = stage.hidden_states(entering, positions, layout)
        if not stage.shape.has_head:
            return hidden
        hidden = stage.whole_sequence(hidden, positions.numel())
        if is_document:
            # All samples of a block draw their first token from the same logits.
            hidden, samples = hidden[torch.tensor(plan.anchors, device=device) - 1], 1
        else:
            samples = plan.num_samples
        logits = stage.logits(hidden.transpose(0, 1).flatten(0, 1))
        logits = logits.view(-1, plan.num_blocks, samples, logits.shape[-1]).transpose(1, 2)  # [B, n or 1, K, V]
        keys = noise_keys(
            self.sampling.seed, self.step, batch.row_indices, plan.num_samples, plan.num_blocks, slot.pass_index
        )
        tokens = sample_tokens(logits, keys, self.sampling.temperature, self.sampling.top_p, self.model.vocabulary)
        self.drawn[slot.micro_batch].append(tokens)
        return tokens

    def hidden_buffer(self, slot: Slot) -> Tensor:
        """For the hidden states of the document or of one token per rollout."""
        length = self.plan.anchors[-1] if slot.pass_index == 0 else self.plan.rollouts_per_row
        return self.model.hidden.empty(length, len(self.micro_batches[slot.micro_batch].tokens))

    def tokens_buffer(self, slot: Slot) -> Tensor:
        """For one token of every rollout."""
        tokens = self.micro_batches[slot.micro_batch].tokens
        return tokens.new_empty((len(tokens), self.plan.num_samples, self.plan.num_blocks))
