"""Inner products of a block's rollout features and target feature, without ever forming a feature.

A feature is the concatenation of tapped layers, normalised; its inner products are sums over layers of inner
products of hidden states, so layers (and later shards and stages) add up and only `[B, K, n+1, n+1]` matters.
Features are rows 0..n-1 for the samples and row n for the target. Everything after the hidden states is float64:
whitening tells a duplicate from a near-duplicate at a relative eigenvalue of 1e-10.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ebft_mega.rollout.plan import BlockPlan

EmbedMethod = Literal["last_token", "mean_pooling"]
FeatureNorm = Literal["joint", "per_layer"]


def block_rows(hidden: Tensor, plan: BlockPlan, embed_method: EmbedMethod) -> Tensor:
    """Hidden states of each block's rollouts and target at the positions that pooling reads.

    Args:
        hidden: [P + R * G, B, H], one tapped layer over a packed sequence.
        embed_method: `last_token` reads the last position of each window, `mean_pooling` all G.
    Returns:
        float64 [B, K, n + 1, T, H]; T is 1 or G.
    """
    length, generated = plan.sequence_length, plan.generate_length
    first = generated - 1 if embed_method == "last_token" else 0
    rollouts = hidden[length:].unflatten(0, (plan.num_blocks, plan.num_samples, generated))[:, :, first:]
    window = torch.arange(first, generated, device=hidden.device)
    targets = hidden[torch.tensor(plan.anchors, device=hidden.device)[:, None] + window]  # [K, T, B, H]
    rows = torch.cat((rollouts, targets[:, None]), dim=1)  # [K, n + 1, T, B, H]
    return rows.permute(3, 0, 1, 2, 4).to(torch.float64)


def inner_products(features: Tensor) -> Tensor:
    """[..., n + 1, H] -> [..., n + 1, n + 1], symmetric to the last bit."""
    gram = features @ features.transpose(-1, -2)
    return (gram + gram.transpose(-1, -2)) / 2


def unit_diagonal(gram: Tensor) -> Tensor:
    """The Gram matrix of the same features scaled to length one; a zero feature stays zero."""
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp(min=torch.finfo(gram.dtype).tiny).sqrt()
    return gram / (norms[..., :, None] * norms[..., None, :])


def pool_tokens(rows: Tensor, squared_norms: Tensor) -> Tensor:
    """Mean over tokens of normalised token features; the mean itself is not normalised (the authors' code).

    Args:
        rows: [B, K, n + 1, G, H]; squared_norms: [B, K, n + 1, G], over all layers that are normalised together.
    Returns:
        [B, K, n + 1, H].
    """
    lengths = squared_norms.clamp(min=torch.finfo(rows.dtype).tiny).sqrt()
    return (rows / lengths[..., None]).mean(dim=-2)


def block_grams(
    taps: Sequence[Tensor], plan: BlockPlan, embed_method: EmbedMethod, feature_norm: FeatureNorm
) -> Tensor:
    """Gram matrix of every block from the tapped layers of one packed pass.

    Args:
        taps: one [P + R * G, B, H] per tapped layer, in the network's dtype.
        feature_norm: `joint` scales the concatenated layers to length one (the authors' code), `per_layer` each
            layer before concatenation (length sqrt(number of layers); axolotl).
    Returns:
        float64 [B, K, n + 1, n + 1].
    Communication: none.
    Source: EBFT paper (arXiv 2603.12248), feature network; the authors' `hidden_state_method: concat`.
    """
    rows = [block_rows(hidden, plan, embed_method) for hidden in taps]
    if embed_method == "last_token":
        grams = [inner_products(layer[..., 0, :]) for layer in rows]
        if feature_norm == "per_layer":
            grams = [unit_diagonal(gram) for gram in grams]
        total = torch.stack(grams).sum(dim=0)
        return unit_diagonal(total) if feature_norm == "joint" else total
    # Pooling comes after normalisation, so a joint norm needs each token's length over all layers first.
    squared_norms = [layer.square().sum(dim=-1) for layer in rows]
    if feature_norm == "joint":
        squared_norms = [torch.stack(squared_norms).sum(dim=0)] * len(rows)
    pooled = [pool_tokens(layer, norms) for layer, norms in zip(rows, squared_norms, strict=True)]
    return torch.stack([inner_products(layer) for layer in pooled]).sum(dim=0)
