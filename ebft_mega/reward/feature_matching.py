"""How close rollouts are to the target in feature space, without whitening: figures of evaluations."""

from torch import Tensor

from ebft_mega.reward.marked_blocks import finite_blocks, mark_blocks
from ebft_mega.reward.whitening import cosine_of, split_gram


def raw_cosine(gram: Tensor) -> Tensor:
    """Cosine of every rollout's feature with the target's, without whitening and without the factor 2.

    Args:
        gram: float64 [B, K, n + 1, n + 1].
    Returns:
        float64 [B, n, K]; NaN for a block with an inner product that is not finite.
    Communication: none.
    """
    rollouts, cross, target = split_gram(mark_blocks(gram, finite_blocks(gram)))
    cosine = cosine_of(cross, rollouts.diagonal(dim1=-2, dim2=-1), target[..., None])
    return cosine.transpose(-1, -2)


def unbiased_feature_matching(gram: Tensor) -> Tensor:
    """Unbiased estimate of |E x - y|^2 without whitening: the U-statistic over pairs of different rollouts.

    The plain squared distance of the mean (`BlockInputs.cfm`) is larger by the variance of a mean of n. May be
    negative.

    Args:
        gram: float64 [B, K, n + 1, n + 1], n >= 2.
    Returns:
        float64 [B, K]; NaN for a block with an inner product that is not finite.
    Raises:
        ValueError: for n = 1, where there is no pair.
    Communication: none.
    Source: EBFT paper (arXiv 2603.12248), feature-matching loss; 1 - the authors' `feature_map_reward`.
    """
    rollouts, cross, target = split_gram(mark_blocks(gram, finite_blocks(gram)))
    n = cross.shape[-1]
    if n < 2:
        raise ValueError("the unbiased feature-matching loss needs at least two samples per anchor")
    pairs = rollouts.sum(dim=(-1, -2)) - rollouts.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return target + pairs / (n * (n - 1)) - 2 * cross.mean(dim=-1)
