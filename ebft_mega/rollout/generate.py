"""Sample rollouts from all anchors at once: one pass over the document, then one token of every rollout per pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ebft_mega.architecture.vocabulary_blocks import HEAD_ROWS
from ebft_mega.block_plan import BlockPlan
from ebft_mega.config.schema import Reuse, RunConfig
from ebft_mega.model.head import RowScores, score_rows
from ebft_mega.model.saved_activations import SavedInputs
from ebft_mega.model.stage import PipelinedModel, Stage
from ebft_mega.model.strided_attention import KeyValueCache, StridedLayout
from ebft_mega.parallel.pipeline import Slot, run_ring, share_from_last_stage
from ebft_mega.rollout.forward import SavedForward, sampled_logprobs
from ebft_mega.rollout.noise import noise_keys
from ebft_mega.rollout.packed_order import anchor_positions, document_positions, generated_positions, to_sequence
from ebft_mega.rollout.sampling import drawn_from_finite, sample_tokens, without_marks
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


@dataclass(frozen=True)
class Sampled:
    """A micro-batch's rollouts, and the saved forward pass that sampled them."""

    rollout: Rollout
    saved: SavedForward | None  # None: nothing was saved
    logprobs: Tensor | None = None  # float32 [B, n, K, G] at the sampling temperature; None: not asked for


def generate_rollouts(
    model: PipelinedModel,
    micro_batches: Sequence[TokenBatch],
    plan: BlockPlan,
    sampling: SamplingSettings,
    step: int,
    reuse: Reuse = "off",
    with_targets: bool = False,
    with_logprobs: bool = False,
) -> list[Sampled]:
    """Sample n continuations of G tokens from every anchor of every row.

    The document prefix is processed once; its keys and values serve all samples. The first token comes from the
    logits at `anchor - 1`, so G tokens cost one document pass and G - 1 decode passes of K * n rows. Pipeline
    stages work on different micro-batches at the same time; nothing is flushed between passes. With document masking a
    rollout continues the document that the token before its anchor belongs to, and sees nothing of the others.

    Args:
        model: the policy with whole parameters; recording gradients if `reuse` is `activations`.
        step: optimizer step, part of the sampling noise.
        reuse: what to save for the gradient pass.
        with_targets: the gradient pass will also score the row's own tokens: the document pass reads on to P - 1.
        with_logprobs: the log-probabilities of what is drawn are wanted. Where a forward pass is saved they are noted
            anyway; otherwise they take one normaliser of each row of logits more.
    Returns:
        Per micro-batch the rollout, the same on every rank of the replica, and what this stage saved; tokens are a
        pure function of (weights, row, seed, step, row index, sample, block, token index). Logits that are not finite
        give tokens, too, and a mark of their block.
    Communication: that of the layers and of `sample_tokens`, and of `score_rows` if something is saved or
        log-probabilities are wanted; along the pipeline hidden states, the tokens of each pass back to the first stage,
        and one broadcast of all tokens, with another one of all log-probabilities if they are wanted.
    Memory: keys and values of the micro-batches under way, logits of `HEAD_ROWS` rows, and what is saved of all.
    Source: EBFT paper (arXiv 2603.12248), strided mode.
    """
    decoding = _Decoding(model, micro_batches, plan, sampling, step, reuse, with_targets, with_logprobs)
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
    shared = share_from_last_stage(drawn, shapes, torch.int64, model.groups)
    logprobs: list[Tensor | None] = [None] * len(micro_batches)
    if with_logprobs:
        of_drawn = [sampled_logprobs(part.scores, plan) if part.scores else torch.empty(0) for part in decoding.saved]
        logprobs = [*share_from_last_stage(of_drawn, shapes, torch.float32, model.groups)]
    saved = [None if reuse == "off" else part for part in decoding.saved]
    return [
        Sampled(_rollout(tokens), part, scores) for tokens, part, scores in zip(shared, saved, logprobs, strict=True)
    ]


def _rollout(marked_tokens: Tensor) -> Rollout:
    """The rollout of marked tokens [B, n, K, G]."""
    finite = drawn_from_finite(marked_tokens).all(dim=-1).all(dim=1)
    return Rollout(without_marks(marked_tokens), finite)


class _Decoding:
    """This stage's decoding: pass 0 reads the document, pass t feeds back token t - 1 of every rollout."""

    def __init__(
        self,
        model: PipelinedModel,
        micro_batches: Sequence[TokenBatch],
        plan: BlockPlan,
        sampling: SamplingSettings,
        step: int,
        reuse: Reuse,
        with_targets: bool,
        with_logprobs: bool,
    ):
        self.model, self.micro_batches, self.plan = model, micro_batches, plan
        self.sampling, self.step, self.reuse = sampling, step, reuse
        self.scores_drawn = reuse != "off" or with_logprobs
        # The last block's context, or all that predicts a token of the row; nothing beyond it is read.
        self.document_length = plan.document_length(with_targets)
        self.caches: dict[int, KeyValueCache] = {}  # of the micro-batches that are under way
        self.saved = [SavedForward() for _ in micro_batches]
        self.drawn: list[list[Tensor]] = [[] for _ in micro_batches]  # last stage: [B, n, K] per token, marked

    def run(self, slot: Slot, received: Tensor | None) -> Tensor:
        """One pass of one micro-batch through this stage."""
        if slot.pass_index == 0:
            self.caches[slot.micro_batch] = KeyValueCache(self.plan.generate_length - 1)
        output: Tensor = self.model.run(lambda stage: self._pass(stage, slot, received))
        if slot.pass_index == self.plan.generate_length - 1:
            del self.caches[slot.micro_batch]
        return output

    def _pass(self, stage: Stage, slot: Slot, received: Tensor | None) -> Tensor:
        plan, batch = self.plan, self.micro_batches[slot.micro_batch]
        device, is_document = batch.tokens.device, slot.pass_index == 0
        if is_document:
            positions = document_positions(self.document_length, device, batch.documents)
        else:
            positions = generated_positions(plan, slot.pass_index - 1, 1, device, batch.documents)
        layout = StridedLayout.of(
            plan,
            stage.attention,
            document_length=self.document_length if is_document else 0,
            tokens_per_rollout=0 if is_document else 1,
            cache=self.caches[slot.micro_batch],
            documents=batch.documents,
        )
        if received is None:
            entering = batch.tokens[:, : self.document_length]
        elif stage.shape.has_embedding:
            entering = to_sequence(received[..., None])  # the tokens before, [B, n, K] -> [B, R]
        else:
            entering = received
        hidden = self._hidden_states(stage, slot, entering, positions, layout)
        if not stage.shape.has_head:
            return hidden
        with torch.no_grad():
            hidden = stage.whole_sequence(hidden, len(positions))
            if is_document:
                # All samples of a block draw their first token from the same logits.
                hidden = hidden[anchor_positions(plan, device) - 1]
            tokens = self._draw(stage, slot, hidden.unflatten(0, (plan.num_blocks, -1)))
        self.drawn[slot.micro_batch].append(tokens)
        return without_marks(tokens)

    def _hidden_states(
        self, stage: Stage, slot: Slot, entering: Tensor, positions: Tensor, layout: StridedLayout
    ) -> Tensor:
        """Run the layers and save what the gradient pass will reuse."""
        saved = self.saved[slot.micro_batch]
        saved.pass_lengths.append(len(positions))
        if self.reuse == "checkpoints" and saved.inputs is None:
            saved.inputs = SavedInputs(stage.shape.num_layers, has_output=stage.shape.has_head)
        if self.reuse == "activations" and not stage.shape.has_embedding:
            saved.entering.append(entering.requires_grad_())
        hidden = stage.hidden_states(entering, positions, layout, saved.inputs)
        if self.reuse == "activations":
            saved.leaving.append(hidden)
        return hidden

    def _draw(self, stage: Stage, slot: Slot, rows: Tensor) -> Tensor:
        """Sample the next token of every rollout, a few blocks at a time.

        Args:
            rows: [K, 1 or n, B, H] before the final norm, the same on every tensor-parallel rank.
        Returns:
            int64 [B, n, K], marked (`sample_tokens`).
        """
        plan, sampling = self.plan, self.sampling
        batch, own_slice = self.micro_batches[slot.micro_batch], self.model.vocabulary
        keys = noise_keys(
            sampling.seed, self.step, batch.row_indices, plan.num_samples, plan.num_blocks, slot.pass_index
        )
        blocks_at_once = max(1, HEAD_ROWS // rows[0, ..., 0].numel())
        drawn, scores = [], []
        for part, part_keys in zip(rows.split(blocks_at_once), keys.split(blocks_at_once, dim=2), strict=True):
            logits = stage.logits(part.flatten(0, 2))
            spread = logits.view(*part.shape[:3], -1).permute(2, 1, 0, 3)  # [B, 1 or n, blocks, V]
            tokens = sample_tokens(spread, part_keys, sampling.temperature, sampling.top_p, own_slice)
            drawn.append(tokens)
            if self.scores_drawn:
                # One choice from each row, or at the anchors, whose row all samples share, n.
                order = (2, 1, 0) if part.shape[1] > 1 else (2, 0, 1)
                choices = without_marks(tokens).permute(order).reshape(len(logits), -1)
                temperature = torch.full((len(logits),), sampling.temperature, dtype=torch.float64, device=rows.device)
                scores.append(score_rows(logits, choices, temperature, own_slice))
        if scores:
            self.saved[slot.micro_batch].scores.append(
                RowScores(
                    torch.cat([score.logprobs for score in scores]), torch.cat([score.normalizers for score in scores])
                )
            )
        return torch.cat(drawn, dim=2)

    def hidden_buffer(self, slot: Slot) -> Tensor:
        """For the hidden states of the document or of one token per rollout."""
        length = self.document_length if slot.pass_index == 0 else self.plan.rollouts_per_row
        return self.model.hidden.empty(length, len(self.micro_batches[slot.micro_batch].tokens))

    def tokens_buffer(self, slot: Slot) -> Tensor:
        """For one token of every rollout."""
        tokens = self.micro_batches[slot.micro_batch].tokens
        return tokens.new_empty((len(tokens), self.plan.num_samples, self.plan.num_blocks))
