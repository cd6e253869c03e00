"""The frozen feature network: a copy of the initial model, cut at its deepest tapped layer, without a head."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ebft_mega.features.gram import EmbedMethod, FeatureNorm, block_grams
from ebft_mega.model.architecture import Architecture, tapped_layers
from ebft_mega.model.attention import StridedLayout
from ebft_mega.model.huggingface import WeightSource, load_weights
from ebft_mega.model.stage import Stage, StageShape
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.reward.duplicates import copy_duplicate_rows
from ebft_mega.rollout.layout import packed_sequence
from ebft_mega.rollout.plan import BlockPlan
from ebft_mega.types import Rollout, TokenBatch


@dataclass(frozen=True)
class FeatureNetwork:
    """A stage that is never trained, and how its layers become a feature."""

    stage: Stage
    taps: tuple[int, ...]  # depths in blocks from the input
    embed_method: EmbedMethod
    feature_norm: FeatureNorm

    @torch.no_grad()
    def grams(self, batch: TokenBatch, rollout: Rollout, plan: BlockPlan) -> Tensor:
        """Inner products of each block's rollout features and target feature.

        One packed pass per micro-batch: the document once, all rollouts beside it; the target's feature is read
        from the document itself. Rollouts with equal tokens get equal rows, whatever a kernel rounds.

        Returns:
            float64 [B, K, n + 1, n + 1]; the last row is the target.
        Communication: that of the stage's layers.
        """
        sequence, positions = packed_sequence(batch.tokens, rollout.tokens, plan)
        layout = StridedLayout.of(
            plan,
            batch.tokens.device,
            document_length=plan.sequence_length,
            tokens_per_rollout=plan.generate_length,
        )
        _, taps = self.stage.hidden_states(sequence, positions, layout, self.taps)
        return copy_duplicate_rows(block_grams(taps, plan, self.embed_method, self.feature_norm), rollout.tokens)


def build_feature_network(
    architecture: Architecture,
    source: WeightSource,
    layer_fractions: list[float] | tuple[float, ...],
    embed_method: EmbedMethod,
    feature_norm: FeatureNorm,
    groups: ProcessGroups,
    dtype: torch.dtype,
) -> FeatureNetwork:
    """Load the lower layers of a model as a frozen feature network, whole on every rank.

    Args:
        layer_fractions: relative depths to tap, as `ebft.feature_layers`.
    """
    taps = tapped_layers(layer_fractions, architecture.num_hidden_layers)
    stage = Stage(architecture, StageShape.up_to(taps[-1], architecture), groups, dtype)
    load_weights(stage, source)
    stage.to(groups.device).requires_grad_(False).eval()
    return FeatureNetwork(stage, taps, embed_method, feature_norm)
