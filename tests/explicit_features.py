"""The feature of each map as one explicit vector, in float64: what Gram matrices are compared with."""

from collections.abc import Sequence

import torch
from torch import Tensor

NORMS = ("joint", "per_layer")


def explicit_feature(layers: Tensor, method: str, norm: str, weights: Sequence[float] | None = None) -> Tensor:
    """Whole features of windows.

    Args:
        layers: hidden states of the G tokens of each window in each layer that is read, [..., G, L, H].
    Returns:
        [..., D].
    """
    hidden = layers.double()
    if method == "last_token":
        parts = unit(hidden[..., -1:, :, :], norm)
    elif method == "mean_pooling":
        parts = unit(hidden, norm).mean(dim=-3, keepdim=True)
    elif method == "concat":
        parts = unit(hidden, norm)
    elif method == "completion_mean":
        parts = unit(hidden.mean(dim=-3, keepdim=True), norm)
    else:
        raise AssertionError(f"{method} has no explicit vector here")
    if weights is not None:
        parts = parts * hidden.new_tensor(weights).sqrt()[:, None]
    return parts.flatten(-3)


def unit(vectors: Tensor, norm: str) -> Tensor:
    """Vectors [..., L, H] scaled to length one: all layers together, or each by itself."""
    if norm == "joint":
        return vectors / vectors.flatten(-2).norm(dim=-1)[..., None, None]
    return vectors / vectors.norm(dim=-1, keepdim=True)


def explicit_gram(layers: Tensor, method: str, norm: str, weights: Sequence[float] | None = None) -> Tensor:
    """Inner products [..., n + 1, n + 1] of explicit features, from hidden states [..., n + 1, G, L, H]."""
    features = explicit_feature(layers, method, norm, weights)
    return torch.einsum("...id,...jd->...ij", features, features)
