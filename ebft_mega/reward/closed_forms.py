"""Alignment, diversity and CFM of a block in closed form from the Gram matrix of its features.

With X [n, D] the rollout features, y [D] the target's, G = X Xᵀ, g = X y and γ = y·y, every whitened quantity is a
function of (G, g, γ); no whitening matrix over D is ever formed. One n×n eigendecomposition serves them all.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ebft_mega.types import BlockRewards

Whitening = Literal["none", "sample", "feature"]

SINGULAR_VALUE_TOLERANCE = 1e-5  # relative to the largest; the authors' code
SINGULAR_VALUE_EPSILON = 1e-12
COSINE_EPSILON = 1e-8  # smallest norm in a cosine, as torch's cosine_similarity


@dataclass(frozen=True)
class WhitenedBlock:
    """Inner products after whitening."""

    dots: Tensor  # [B, K, n, n], rollouts among themselves
    cosine: Tensor  # [B, K, n], each rollout and the target
    cfm: Tensor  # [B, K], squared distance of the mean rollout to the target


def block_rewards(
    gram: Tensor, whitening: Whitening, alignment_coef: float, diversity_coef: float
) -> BlockRewards:
    """Reward terms of every rollout of every block.

    Alignment is twice the cosine to the target, diversity twice the mean inner product with the other rollouts (0
    for n = 1); reward = alignment_coef * alignment - diversity_coef * diversity.

    Args:
        gram: float64 [B, K, n + 1, n + 1], target last.
        whitening: `none`; `sample`, the authors' code; `feature`, the paper's without its factor sqrt(n) (axolotl).
    Communication: none.
    Source: EBFT paper (arXiv 2603.12248), equation 7, and the authors' code.
    """
    block = {"none": _not_whitened, "sample": _sample_whitened, "feature": _feature_whitened}[whitening](
        gram[..., :-1, :-1], gram[..., :-1, -1], gram[..., -1, -1]
    )
    num_samples = block.dots.shape[-1]
    others = block.dots.sum(dim=-1) - block.dots.diagonal(dim1=-2, dim2=-1)
    alignment = 2.0 * block.cosine.transpose(1, 2)
    diversity = 2.0 * (others / max(1, num_samples - 1)).transpose(1, 2)
    reward = alignment_coef * alignment - diversity_coef * diversity
    return BlockRewards(alignment, diversity, reward, block.cfm)


def raw_cosine(gram: Tensor) -> Tensor:
    """Cosine of each rollout's feature and the target's, without whitening: float64 [B, n, K]."""
    block = _not_whitened(gram[..., :-1, :-1], gram[..., :-1, -1], gram[..., -1, -1])
    return block.cosine.transpose(1, 2)


def unbiased_feature_matching(gram: Tensor) -> Tensor:
    """Unbiased (U-statistic) estimate of the squared distance between the model's mean feature and the target.

    γ + Σ_{j≠k} G_jk / (n (n - 1)) - 2 Σ_j g_j / n; unlike CFM it has no term that shrinks with n.

    Returns:
        float64 [B, K].
    Raises:
        ValueError: n = 1, which has no pair.
    """
    rollouts, cross, target = gram[..., :-1, :-1], gram[..., :-1, -1], gram[..., -1, -1]
    num_samples = cross.shape[-1]
    if num_samples < 2:
        raise ValueError("the unbiased feature-matching loss needs at least two samples per anchor")
    pairs = rollouts.sum(dim=(-2, -1)) - rollouts.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return target + pairs / (num_samples * (num_samples - 1)) - 2.0 * cross.mean(dim=-1)


def _cosine(dot: Tensor, squared_norm: Tensor, other_squared_norm: Tensor) -> Tensor:
    norms = [value.clamp(min=0).sqrt().clamp(min=COSINE_EPSILON) for value in (squared_norm, other_squared_norm)]
    return dot / (norms[0] * norms[1])


def _not_whitened(rollouts: Tensor, cross: Tensor, target: Tensor) -> WhitenedBlock:
    """Plain features."""
    num_samples = cross.shape[-1]
    cosine = _cosine(cross, rollouts.diagonal(dim1=-2, dim2=-1), target[..., None])
    cfm = rollouts.sum(dim=(-2, -1)) / num_samples**2 - 2.0 * cross.mean(dim=-1) + target
    return WhitenedBlock(rollouts, cosine, cfm)


def _matrix_powers(rollouts: Tensor, powers: tuple[int, ...]) -> list[Tensor]:
    """Pseudo-powers U diag(s^p on kept directions) Uᵀ of the features' singular values, from their Gram matrix."""
    eigenvalues, vectors = torch.linalg.eigh(rollouts)
    singular = eigenvalues.clamp(min=0).sqrt()
    largest = singular.amax(dim=-1, keepdim=True)
    kept = singular > SINGULAR_VALUE_TOLERANCE * largest
    results = []
    for power in powers:
        base = singular + SINGULAR_VALUE_EPSILON if power < 0 else singular
        values = torch.where(kept, base.clamp(min=torch.finfo(base.dtype).tiny) ** power, 0.0)
        results.append((vectors * values[..., None, :]) @ vectors.transpose(-1, -2))
    return results


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]


def _sample_whitened(rollouts: Tensor, cross: Tensor, target: Tensor) -> WhitenedBlock:
    """The authors' code: W = (X Xᵀ)^(-1/2) on both sides, so each target row is a multiple c_j of y, c = W 1."""
    num_samples = cross.shape[-1]
    projector, inverse_root = _matrix_powers(rollouts, (0, -1))
    coefficient = inverse_root.sum(dim=-1)
    whitened_cross = _apply(inverse_root, cross)  # x̃_j · y
    own = projector.diagonal(dim1=-2, dim2=-1)
    target_norm = coefficient.square() * target[..., None]
    cosine = _cosine(coefficient * whitened_cross, own, target_norm)
    total = coefficient.sum(dim=-1)
    cfm = total.square() * target - 2.0 * total * whitened_cross.sum(dim=-1) + projector.sum(dim=(-2, -1))
    return WhitenedBlock(projector, cosine, cfm / num_samples**2)


def _feature_whitened(rollouts: Tensor, cross: Tensor, target: Tensor) -> WhitenedBlock:
    """The paper and axolotl: (XᵀX)^(-1/2) over feature space, so ỹ = Vᵀ-coordinates of the least-squares fit."""
    num_samples = cross.shape[-1]
    projector, pseudo_inverse = _matrix_powers(rollouts, (0, -2))
    fit = _apply(pseudo_inverse, cross)  # β = G⁺ g = x̃_j · ỹ
    own = projector.diagonal(dim1=-2, dim2=-1)
    squared_norm = fit.square().sum(dim=-1)  # ‖ỹ‖² = ‖β‖², the projection of y carries all of it
    cosine = _cosine(fit, own, squared_norm[..., None])
    cfm = projector.sum(dim=(-2, -1)) / num_samples**2 - 2.0 * fit.mean(dim=-1) + squared_norm
    return WhitenedBlock(projector, cosine, cfm)
