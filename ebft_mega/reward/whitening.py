"""Inner products of features after whitening, in closed form from the Gram matrix.

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
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Whitening = Literal["none", "sample", "feature"]

# A singular value of the features counts as zero below this share of the largest: 1e-10 on the Gram matrix's
# eigenvalues, which is why that must be float64.
SINGULAR_VALUE_TOLERANCE = 1e-5
NORM_EPSILON = 1e-8  # smallest length that a cosine divides by


@dataclass(frozen=True)
class Products:
    """Inner products after whitening, of the rollouts x_j and each one's own copy y_j of the target, float64."""

    rollouts: Tensor  # [B, K, n, n], x_j . x_k
    cross: Tensor  # [B, K, n], x_j . y_j
    target: Tensor  # [B, K, n], y_j . y_j
    squared_distance: Tensor  # [B, K], of the means of x and of y; rounding may leave it below 0

    @cached_property
    def cosine(self) -> Tensor:
        """Cosine of x_j and y_j, [B, K, n]; 0 where one of them is 0."""
        return cosine_of(self.cross, self.rollouts.diagonal(dim1=-2, dim2=-1), self.target)


def whitened_products(gram: Tensor, whitening: Whitening) -> Products:
    """Inner products in the space of a whitening (the table above).

    Args:
        gram: float64 [B, K, n + 1, n + 1], symmetric and finite, samples first, the target last.
    Raises:
        TypeError: it has another dtype.
        ValueError: there is no such whitening.
    Communication: none.
    Source: EBFT paper (arXiv 2603.12248) and axolotl for `feature`; the authors' code for `sample`.
    """
    rollouts, cross, target = split_gram(gram)
    n = cross.shape[-1]
    if whitening == "none":
        cfm = rollouts.sum(dim=(-1, -2)) / n**2 - 2 * cross.mean(dim=-1) + target
        return Products(rollouts, cross, target[..., None].expand_as(cross), cfm)
    vectors, nonzero, inverse = _decompose(rollouts)
    projector = _rebuild(vectors, nonzero)
    spread = projector.sum(dim=(-1, -2)) / n**2  # |mean of x|^2
    if whitening == "sample":
        whitener = _rebuild(vectors, inverse)
        scales = whitener.sum(dim=-1)  # c = W 1
        along = (whitener @ cross[..., None])[..., 0]  # x_j . y = (W g)_j
        mean_scale = scales.mean(dim=-1)
        cfm = mean_scale.square() * target - 2 * mean_scale * along.mean(dim=-1) + spread
        return Products(projector, scales * along, scales.square() * target[..., None], cfm)
    if whitening == "feature":
        beta = (_rebuild(vectors, inverse.square()) @ cross[..., None])[..., 0]
        square = beta.square().sum(dim=-1)
        cfm = spread - 2 * beta.mean(dim=-1) + square
        return Products(projector, beta, square[..., None].expand_as(beta), cfm)
    raise ValueError(f"whitening must be none, sample or feature, not {whitening!r}")


def split_gram(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """G [B, K, n, n], g [B, K, n] and gamma [B, K] of the legend above.

    Raises:
        TypeError: the Gram matrices are not float64.
    """
    if gram.dtype != torch.float64:
        raise TypeError(f"Gram matrices must be float64 to tell duplicates from near-duplicates, not {gram.dtype}")
    return gram[..., :-1, :-1], gram[..., :-1, -1], gram[..., -1, -1]


def cosine_of(product: Tensor, first_square: Tensor, second_square: Tensor) -> Tensor:
    """Inner product over both lengths, of any shape; 0 where a vector is 0."""
    first = first_square.clamp(min=0).sqrt().clamp(min=NORM_EPSILON)
    second = second_square.clamp(min=0).sqrt().clamp(min=NORM_EPSILON)
    return product / (first * second)


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
