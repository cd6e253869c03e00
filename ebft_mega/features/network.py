"""The frozen feature network: a copy of the initial model, cut at its deepest tapped layer, without a head."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from ebft_mega.features.gram import EmbedMethod, FeatureNorm, block_grams, pooled_positions
from ebft_mega.model.attention import StridedLayout
from ebft_mega.model.stage import Stage, select_positions
from ebft_mega.parallel.optimizer import StageRunner
from ebft_mega.parallel.pipeline import Slot, run_ring
from ebft_mega.reward.duplicates import copy_duplicate_rows
from ebft_mega.rollout.layout import packed_sequence
from ebft_mega.rollout.plan import BlockPlan
from ebft_mega.types import Rollout, TokenBatch


@dataclass(frozen=True)
class FeatureNetwork:
    """A model that is never trained, and how its layers become a feature.

    Its layers are cut into pipeline stages by themselves, not where the policy's are.
    """

    stage: Stage  # this rank's; only what it is, its parameters may be partitioned
    whole_parameters: Callable[[], AbstractContextManager[StageRunner]]
    taps: tuple[int, ...]  # depths in blocks from the input
    embed_method: EmbedMethod
    feature_norm: FeatureNorm

    @torch.no_grad()
    def grams(self, micro_batches: Sequence[TokenBatch], rollouts: Sequence[Rollout], plan: BlockPlan) -> list[Tensor]:
        """Inner products of each block's rollout features and target feature, per micro-batch.

        One packed pass per micro-batch: the document once, all rollouts beside it; the target's feature is read
        from the document itself. Features stay on the ranks that computed them. Rollouts with equal tokens get
        equal rows, whatever a kernel rounds.

        Returns:
            float64 [B, K, n + 1, n + 1] each, the same on every rank of the replica; the last row is the target.
        Communication: that of the layers; hidden states from stage to stage; what `block_grams` says.
        """
        tapped: list[list[Tensor]] = []  # per micro-batch, [B, K, n + 1, T, H / ranks] per tap on this stage

        def hidden_buffer(slot: Slot) -> Tensor:
            length = plan.sequence_length + plan.rollouts_per_row * plan.generate_length
            return self.stage.hidden.empty(length, len(micro_batches[slot.micro_batch].tokens))

        with self.whole_parameters() as whole:

            def run(slot: Slot, received: Tensor | None) -> Tensor:
                batch, rollout = micro_batches[slot.micro_batch], rollouts[slot.micro_batch]
                hidden, rows = whole(lambda stage: self._packed_pass(stage, batch, rollout, plan, received))
                tapped.append(rows)
                return hidden

            run_ring(self.stage.groups, len(micro_batches), run, hidden_buffer)
        return [
            copy_duplicate_rows(self._gram(rows, rollout, plan), rollout.tokens)
            for rows, rollout in zip(tapped, rollouts, strict=True)
        ]

    def _packed_pass(
        self, stage: Stage, batch: TokenBatch, rollout: Rollout, plan: BlockPlan, received: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Hidden states for the next stage, and the rows of this stage's taps that this rank is to multiply."""
        sequence, positions = packed_sequence(batch.tokens, rollout.tokens, plan)
        layout = StridedLayout.of(
            plan,
            sequence.device,
            document_length=plan.sequence_length,
            tokens_per_rollout=plan.generate_length,
        )
        entering = sequence if received is None else received
        hidden, taps = stage.hidden_states(entering, positions, layout, stage.shape.taps_within(self.taps))
        read = pooled_positions(plan, self.embed_method, sequence.device)
        rows = [select_positions(tap, read.flatten(), stage.hidden.sequence_shards, stage.groups) for tap in taps]
        return hidden, [tap.unflatten(0, read.shape).permute(3, 0, 1, 2, 4) for tap in rows]

    def _gram(self, rows: Sequence[Tensor], rollout: Rollout, plan: BlockPlan) -> Tensor:
        """Gram matrices of a micro-batch."""
        device = rollout.tokens.device
        shape = (len(rollout.tokens), *pooled_positions(plan, self.embed_method, device).shape)
        return block_grams(rows, shape, self.embed_method, self.feature_norm, self.stage.groups, device)
