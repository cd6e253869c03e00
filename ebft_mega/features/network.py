"""The frozen feature network: a copy of the initial model, cut above the deepest layer that features are read from.

A layer whose output features are read from is *tapped*. The copy has no language-model head.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from ebft_mega.block_plan import BlockPlan
from ebft_mega.errors import EntryError
from ebft_mega.extension.entry_fault import EntryFaultError
from ebft_mega.features.gram import FeatureRecipe, PooledRows, block_grams
from ebft_mega.features.own_features import OwnFeatures
from ebft_mega.forest import Forest
from ebft_mega.model.stage import Stage
from ebft_mega.model.strided_attention import StridedLayout
from ebft_mega.parallel.pipeline import Slot, run_ring
from ebft_mega.parallel.stage_module import StageRunner
from ebft_mega.reward.duplicates import copy_duplicate_rows
from ebft_mega.reward.marked_blocks import mark_blocks
from ebft_mega.rollout.packed_order import packed_sequence
from ebft_mega.runtime.agreement import first_problem
from ebft_mega.types import Rollout, TokenBatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FeatureNetwork:
    """A model that is never trained, and how the feature is made of its layers.

    Its layers are cut into pipeline stages by themselves, not where the policy's are.
    """

    stage: Stage  # this rank's; only what it is, its parameters may be partitioned
    whole_parameters: Callable[[], AbstractContextManager[StageRunner]]
    taps: tuple[int, ...]  # depths in blocks from the input
    recipe: FeatureRecipe

    @property
    def _stage_weights(self) -> tuple[float, ...] | None:
        """Weights of the layers that are tapped on this stage; None: there are none."""
        if self.recipe.layer_weights is None:
            return None
        own = self.stage.shape.taps_within(self.taps)
        return tuple(w for tap, w in zip(self.taps, self.recipe.layer_weights, strict=True) if tap in own)

    @torch.no_grad()
    def grams(
        self,
        micro_batches: Sequence[TokenBatch],
        rollouts: Sequence[Rollout],
        plan: BlockPlan,
        take: Callable[[int, OwnFeatures], None] | None = None,
    ) -> list[Tensor]:
        """Inner products of each block's rollout features and target feature, per micro-batch.

        One packed pass per micro-batch: the document once, all nodes of rollouts beside it; the target's feature is
        read from the document itself. In the deepest tapped layer only rows that are read go through what follows the
        attention. Features stay on the ranks that computed them. Rollouts with equal tokens get equal inner products,
        whatever a kernel rounds where they are not merged.

        Args:
            take: given the number of each micro-batch and this rank's part of its features, once they are measured.
        Returns:
            float64 [B, K, n + 1, n + 1] each, the same on every rank of the replica; the last row is the target. NaN
            throughout for a marked block: a feature, or a logit that its tokens were drawn from, was not finite.
        Raises:
            EntryError: on every rank of the world, where a plugin's map did not hold its contract on one of them.
        Communication: that of the layers; hidden states from stage to stage; what `block_grams` says; for a map that is
            not one of the package's own what `first_problem` says, so all replicas must call it equally often.
        """
        pooled = [PooledRows.of(plan, self.recipe.window, rollout.forest) for rollout in rollouts]
        tapped = self.tapped_rows(micro_batches, rollouts, plan, pooled, spread=True)
        return self.grams_of_rows(tapped, pooled, rollouts, take)

    @torch.no_grad()
    def tapped_rows(
        self,
        micro_batches: Sequence[TokenBatch],
        rollouts: Sequence[Rollout],
        plan: BlockPlan,
        pooled: Sequence[PooledRows],
        spread: bool,
    ) -> list[list[Tensor]]:
        """Run the packed passes and keep the rows that are read of the layers that are tapped on this stage.

        Args:
            pooled: of each micro-batch; spread: give each feature its rows; else each row is kept once.
        Returns:
            Per micro-batch a tensor per tap, [B, K, n + 1, T, H / ranks] as `PooledRows.places` says, or [N, H / ranks]
            as `PooledRows.read` says.
        Communication: that of the layers; hidden states from stage to stage.
        """
        tapped: list[list[Tensor]] = []

        def hidden_buffer(slot: Slot) -> Tensor:
            length = micro_batches[slot.micro_batch].tokens.numel() + rollouts[slot.micro_batch].forest.num_nodes
            if not self.stage.shape.num_layers:  # behind the deepest tap: a pipeline may be longer than a network
                length = len(pooled[slot.micro_batch].read.positions)
            return self.stage.hidden.empty(length)

        with self.whole_parameters() as whole:

            def run(slot: Slot, received: Tensor | None) -> Tensor:
                index = slot.micro_batch
                batch, forest, read = micro_batches[index], rollouts[index].forest, pooled[index]
                hidden, rows = whole(lambda stage: self._packed_pass(stage, batch, forest, plan, read, received))
                tapped.append([each[:, 0][read.places] if spread else each[:, 0] for each in rows])
                return hidden

            run_ring(self.stage.groups, len(micro_batches), run, hidden_buffer)
        return tapped

    def grams_of_rows(
        self,
        tapped: Sequence[Sequence[Tensor]],
        pooled: Sequence[PooledRows],
        rollouts: Sequence[Rollout],
        take: Callable[[int, OwnFeatures], None] | None = None,
    ) -> list[Tensor]:
        """Inner products of features, from the rows of the layers that are tapped on this stage; see `grams`.

        Args:
            tapped: per micro-batch [B, K, n + 1, T, H / ranks] for each of this network's taps on this stage.
            rollouts: of this network's G.
        Communication: what `grams` says, without that of the layers.
        """
        faults: list[EntryFaultError] = []
        grams = []
        for index, (rollout, read) in enumerate(zip(rollouts, pooled, strict=True)):
            own: list[OwnFeatures] | None = None if take is None else []
            grams.append(copy_duplicate_rows(self._gram(tapped[index], read, faults, own), rollout.tokens))
            if take is not None and own:
                take(index, own[0])
        self._require_faultless(faults)
        return [
            gram if rollout.finite_blocks is None else mark_blocks(gram, rollout.finite_blocks)
            for gram, rollout in zip(grams, rollouts, strict=True)
        ]

    def _require_faultless(self, faults: Sequence[EntryFaultError]) -> None:
        """End the run on all ranks alike after what the map did on any of them."""
        problem = self.recipe.problem_of(faults[0]) if faults else None
        if faults:
            logger.info("a feature map does not hold its contract", exc_info=faults[0])  # with its own traceback
        if not self.recipe.map.is_built_in():
            problem = first_problem(problem, self.stage.groups.device)
        if problem is not None:
            raise EntryError(problem)

    def _packed_pass(
        self,
        stage: Stage,
        batch: TokenBatch,
        forest: Forest,
        plan: BlockPlan,
        pooled: PooledRows,
        received: Tensor | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Hidden states for the next stage, and of this stage's taps the rows [N, 1, H / ranks] that are read."""
        sequence, positions = packed_sequence(batch.tokens, forest, plan, batch.documents)
        layout = StridedLayout.of(
            plan,
            stage.attention,
            num_rows=len(batch.tokens),
            document_length=plan.sequence_length,
            forest=forest,
            documents=batch.documents,
        )
        entering = sequence if received is None else received
        if not stage.shape.num_layers and received is not None:
            return received, []
        return stage.tapped_rows(entering, positions, layout, pooled.read, self.taps)

    def _gram(
        self,
        rows: Sequence[Tensor],
        pooled: PooledRows,
        faults: list[EntryFaultError],
        own: list[OwnFeatures] | None,
    ) -> Tensor:
        """Gram matrices of a micro-batch."""
        groups = self.stage.groups
        shape = tuple(pooled.places.shape)
        return block_grams(rows, shape, self.recipe, groups, groups.device, self._stage_weights, faults, own)
