"""The reward of a rollout: its alignment term minus its diversity term, in closed form from the Gram matrix.

With X [n, D] the features of a block's rollouts and y [D] the target's, whitening and every quantity after it
are functions of G = X X^T, g = X y and gamma = y . y: no D-sized matrix, no decomposition of X. With
G = U diag(s^2) U^T and 1/s set to 0 for singular values that count as zero,
W = U diag(1/s) U^T, P = U U^T (over the other ones) and beta = W W g:

    whitening   rollouts           target of rollout j     x_j . x_k   x_j . y_j       |y_j|^2
    none        X                  y                       G_jk        g_j             gamma
    sample      W X                c_j y, c = W 1          P_jk        c_j (W g)_j     c_j^2 gamma
    feature     X (X^T X)^(-1/2)   (X^T X)^(-1/2) y        P_jk        beta_j          |beta|^2

Whitened rollouts are the same in both modes; only the target differs. The set that is whitened is the
rollouts of one block alone, not centred. `sample` is the authors' code, `feature` the paper's and axolotl's
definition, here without the paper's factor sqrt(n).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ebft_mega.reward.duplicates import first_equal
from ebft_mega.reward.marked_blocks import finite_blocks, mark_blocks
from ebft_mega.types import BlockRewards

Whitening = Literal["none", "sample", "feature"]

# A singular value of the features counts as zero below this share of the largest: 1e-10 on the Gram matrix's
# eigenvalues, which is why that must be float64.
SINGULAR_VALUE_TOLERANCE = 1e-5
NORM_EPSILON = 1e-8  # smallest length that a cosine divides by


@dataclass(frozen=True)
class _WhitenedProducts:
    """Inner products after whitening, of the rollouts x_j and each one's own copy y_j of the target."""

    rollouts: Tensor  # [B, K, n, n], x_j . x_k
    cross: Tensor  # [B, K, n], x_j . y_j
    target: Tensor  # [B, K, n], y_j . y_j
    cfm: Tensor  # [B, K], squared distance of the means of x and of y


def block_rewards(gram: Tensor, whitening: Whitening, alignment_coef: float, diversity_coef: float) -> BlockRewards:
    """Alignment, diversity, reward and CFM of every rollout.

    alignment = 2 cos(x_j, y_j); diversity = 2 / (n - 1) * sum over k != j of x_j . x_k, a plain inner
    product, 0 for n = 1. Rollouts with the same inner products get the same figures to the last bit; zero
    features get 0. Everything of a block with an inner product that is not finite is NaN; other blocks are the
    same to the last bit.

    Args:
        gram: float64 [B, K, n + 1, n + 1], symmetric, samples first, the target last; equal rollouts have
            equal rows (`copy_duplicate_rows`).
        whitening: of both terms and the CFM.
        alignment_coef, diversity_coef: weights of the two terms in the reward.
    Returns:
        BlockRewards, float64.
    Communication: none.
    Source: EBFT paper (arXiv 2603.12248), equation 7; the authors' whitening for `sample`.
    """
    finite = finite_blocks(gram)
    # A decomposition raises on NaN, and for all blocks: orthonormal features stand in for those of a marked one.
    stand_in = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    gram = torch.where(finite[..., None, None], gram, stand_in)
    products = _products(gram, whitening)
    lengths = products.rollouts.diagonal(dim1=-2, dim2=-1)
    alignment = 2 * _cosine(products.cross, lengths, products.target)
    num_samples = lengths.shape[-1]
    if num_samples > 1:
        diversity = 2 * (products.rollouts.sum(dim=-1) - lengths) / (num_samples - 1)
    else:
        diversity = torch.zeros_like(alignment)
    # Rounding of the eigenvectors differs between equal rollouts; their rewards must not.
    first = first_equal(gram[..., :-1, :])
    alignment = alignment.gather(-1, first).transpose(-1, -2)
    diversity = diversity.gather(-1, first).transpose(-1, -2)
    reward = alignment_coef * alignment - diversity_coef * diversity
    marked = ~finite[:, None]  # [B, 1, K]
    alignment, diversity, reward = (values.masked_fill(marked, torch.nan) for values in (alignment, diversity, reward))
    return BlockRewards(alignment, diversity, reward, products.cfm.clamp(min=0).masked_fill(~finite, torch.nan))


def raw_cosine(gram: Tensor) -> Tensor:
    """Cosine of every rollout's feature with the target's, without whitening and without the factor 2.

    Args:
        gram: float64 [B, K, n + 1, n + 1].
    Returns:
        float64 [B, n, K]; NaN for a block with an inner product that is not finite.
    Communication: none.
    """
    rollouts, cross, target = _blocks_of(mark_blocks(gram, finite_blocks(gram)))
    cosine = _cosine(cross, rollouts.diagonal(dim1=-2, dim2=-1), target[..., None])
    return cosine.transpose(-1, -2)


def unbiased_feature_matching(gram: Tensor) -> Tensor:
    """Unbiased estimate of |E x - y|^2 without whitening: the U-statistic over pairs of different rollouts.

    The plain squared distance of the mean (`block_rewards(...).cfm`) is larger by the variance of a mean of
    n. May be negative.

    Args:
        gram: float64 [B, K, n + 1, n + 1], n >= 2.
    Returns:
        float64 [B, K]; NaN for a block with an inner product that is not finite.
    Raises:
        ValueError: for n = 1, where there is no pair.
    Communication: none.
    Source: EBFT paper (arXiv 2603.12248), feature-matching loss; 1 - the authors' `feature_map_reward`.
    """
    rollouts, cross, target = _blocks_of(mark_blocks(gram, finite_blocks(gram)))
    n = cross.shape[-1]
    if n < 2:
        raise ValueError("the unbiased feature-matching loss needs at least two samples per anchor")
    pairs = rollouts.sum(dim=(-1, -2)) - rollouts.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return target + pairs / (n * (n - 1)) - 2 * cross.mean(dim=-1)


def _blocks_of(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """G [B, K, n, n], g [B, K, n] and gamma [B, K] of the legend above."""
    if gram.dtype != torch.float64:
        raise TypeError(f"Gram matrices must be float64 to tell duplicates from near-duplicates, not {gram.dtype}")
    return gram[..., :-1, :-1], gram[..., :-1, -1], gram[..., -1, -1]


def _cosine(product: Tensor, first_square: Tensor, second_square: Tensor) -> Tensor:
    """Inner product over both lengths; 0 where a vector is 0."""
    first = first_square.clamp(min=0).sqrt().clamp(min=NORM_EPSILON)
    second = second_square.clamp(min=0).sqrt().clamp(min=NORM_EPSILON)
    return product / (first * second)


def _products(gram: Tensor, whitening: Whitening) -> _WhitenedProducts:
    """Inner products in the space of a whitening (the table above)."""
    rollouts, cross, target = _blocks_of(gram)
    n = cross.shape[-1]
    if whitening == "none":
        cfm = rollouts.sum(dim=(-1, -2)) / n**2 - 2 * cross.mean(dim=-1) + target
        return _WhitenedProducts(rollouts, cross, target[..., None].expand_as(cross), cfm)
    vectors, nonzero, inverse = _decompose(rollouts)
    projector = _rebuild(vectors, nonzero)
    spread = projector.sum(dim=(-1, -2)) / n**2  # |mean of x|^2
    if whitening == "sample":
        whitener = _rebuild(vectors, inverse)
        scales = whitener.sum(dim=-1)  # c = W 1
        along = (whitener @ cross[..., None])[..., 0]  # x_j . y = (W g)_j
        mean_scale = scales.mean(dim=-1)
        cfm = mean_scale.square() * target - 2 * mean_scale * along.mean(dim=-1) + spread
        return _WhitenedProducts(projector, scales * along, scales.square() * target[..., None], cfm)
    if whitening == "feature":
        beta = (_rebuild(vectors, inverse.square()) @ cross[..., None])[..., 0]
        square = beta.square().sum(dim=-1)
        cfm = spread - 2 * beta.mean(dim=-1) + square
        return _WhitenedProducts(projector, beta, square[..., None].expand_as(beta), cfm)
    raise ValueError(f"whitening must be none, sample or feature, not {whitening!r}")


def _decompose(rollouts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Left vectors U [B, K, n, n], whose singular value is not zero [B, K, n], inverse singular values [B, K, n]."""
    eigenvalues, vectors = torch.linalg.eigh(rollouts)
    singular = eigenvalues.clamp(min=0).sqrt()
    nonzero = singular > SINGULAR_VALUE_TOLERANCE * singular.amax(dim=-1, keepdim=True)
    inverse = torch.where(nonzero, singular, 1.0).reciprocal() * nonzero
    return vectors, nonzero.to(rollouts.dtype), inverse


def _rebuild(vectors: Tensor, values: Tensor) -> Tensor:
    """U diag(values) U^T, [B, K, n, n]."""
    return (vectors * values[..., None, :]) @ vectors.transpose(-1, -2)
