"""Figures of a micro-batch's rollouts: of every block from its inner products, then of rows and of parts of rows."""

import torch
from torch import Tensor

from ebft_mega.block_plan import BlockPlan
from ebft_mega.evaluation.conditions import POSITION_BINS, part_of
from ebft_mega.reward.block_inputs import BlockInputs
from ebft_mega.reward.block_rewards import block_rewards
from ebft_mega.reward.duplicates import has_duplicates
from ebft_mega.reward.feature_matching import raw_cosine, unbiased_feature_matching
from ebft_mega.reward.terms.alignment import Alignment
from ebft_mega.reward.whitening import Whitening

# `eval/alignment` is always taken after sample whitening (the authors' definition), whatever `ebft.reward_whitening`
# says, so that models trained with different rewards are compared by the same metric.
ALIGNMENT_WHITENING: Whitening = "sample"


def block_figures(gram: Tensor, tokens: Tensor, whitening: Whitening, plan: BlockPlan) -> dict[str, Tensor]:
    """Metrics of rollouts by `eval/*` name, float64 [B, K] or [B, n, K].

    Args:
        gram: float64 [B, K, n + 1, n + 1]; tokens: int64 [B, n, K, G].
        whitening: of `eval/cfm_loss`; the definitions of the other metrics are fixed.
    Communication: none.
    """
    figures = {
        "eval/alignment": block_alignment(gram, plan),
        "eval/raw_cosine": raw_cosine(gram),
        "eval/cfm_loss": BlockInputs.of(gram, whitening, plan).cfm,
        "eval/duplicate_share": has_duplicates(tokens).to(torch.float64),
    }
    if plan.num_samples > 1:
        figures["eval/feature_matching_loss"] = unbiased_feature_matching(gram)
    return figures


def block_alignment(gram: Tensor, plan: BlockPlan) -> Tensor:
    """`eval/alignment` of every rollout, float64 [B, n, K]; NaN in a marked block."""
    inputs = BlockInputs.of(gram, ALIGNMENT_WHITENING, plan)
    return block_rewards(inputs, [(Alignment(), 1.0)]).terms[Alignment.name].values


def row_means(values: Tensor, finite: Tensor, counted: Tensor | None) -> Tensor:
    """Means [B] of values [B, K] or [B, n, K] over finite blocks, bool [B, K], of all or of counted ones.

    NaN for a row without any.
    """
    used = finite if counted is None else finite & counted
    by_block = values if values.dim() == 2 else values.mean(dim=1)
    means = by_block.masked_fill(~used, 0.0).sum(dim=1) / used.sum(dim=1)
    if counted is not None:
        return means
    # The mean of everything rounds differently; a row that is finite keeps its own bits beside one that is not.
    return torch.where(finite.all(dim=1), values.mean(dim=tuple(range(1, values.dim()))), means)


def part_means(values: Tensor, used: Tensor) -> Tensor:
    """Means over the used ones of each of `POSITION_BINS` equal parts of a row: [B, POSITION_BINS], NaN without any.

    Args:
        values: [B, X] or [B, n, X], X places in the order of the row; used: bool [B, X].
    """
    by_place = values if values.dim() == 2 else values.mean(dim=1)
    count = by_place.shape[1]
    parts = torch.tensor([part_of(place, count) for place in range(count)], device=values.device)
    belongs = torch.nn.functional.one_hot(parts, POSITION_BINS).to(by_place.dtype)
    sums = by_place.masked_fill(~used, 0.0) @ belongs
    return sums / (used.to(by_place.dtype) @ belongs)
