"""Gram matrix of each block's rollout and target features, summed over ranks: features never leave their rank.

A feature is the concatenation of tapped layers, normalised; its inner products are sums over layers and over slices of
the hidden dimension. So no rank ever holds a whole feature: each sums over its own layers and slice, and what is
all-reduced is one `[n + 1, n + 1]` matrix per block. Where vectors are scaled before those sums, their squared lengths
are all-reduced first: with `per_layer` one per layer and token read, with `joint` and `mean_pooling` one per token.
Features are rows 0..n-1 for the samples and row n for the target. Everything after the
hidden states is float64: whitening tells a duplicate from a near-duplicate at a relative eigenvalue of 1e-10.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ebft_mega.block_plan import BlockPlan
from ebft_mega.model.strided_attention import ReadRows
from ebft_mega.parallel.groups import ProcessGroups

EmbedMethod = Literal["last_token", "mean_pooling"]
FeatureNorm = Literal["joint", "per_layer"]


@dataclass(frozen=True)
class PooledRows:
    """Which rows of a packed pass (the document, then all rollouts whole) features are made of."""

    read: ReadRows  # each row once
    places: Tensor  # int64 [K, n + 1, T], which of those rows; T is 1 or G; the target's window is in the document

    @classmethod
    def of(cls, plan: BlockPlan, embed_method: EmbedMethod, device: torch.device) -> "PooledRows":
        """The rows of a plan's features: `last_token` reads the last position of each window, `mean_pooling` all G."""
        tokens = 1 if embed_method == "last_token" else plan.generate_length
        window = range(plan.generate_length - tokens, plan.generate_length)
        # Windows overlap where the stride is smaller than they are.
        document = sorted({anchor + t for anchor in plan.anchors for t in window})
        rollouts = plan.sequence_length + torch.arange(
            plan.rollouts_per_row * window.start, plan.generated_per_row, device=device
        )
        positions = torch.cat((torch.tensor(document, device=device), rollouts))
        place = {position: index for index, position in enumerate(document)}
        targets = torch.tensor([[place[anchor + t] for t in window] for anchor in plan.anchors], device=device)
        sampled = len(document) + torch.arange(len(rollouts), device=device)
        by_rollout = sampled.view(tokens, plan.num_blocks, plan.num_samples).permute(1, 2, 0)  # [K, n, T]
        places = torch.cat((by_rollout, targets[:, None]), dim=1)
        return cls(ReadRows(tuple(document), tokens, positions), places)


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
        rows: [B, K, n + 1, T, H or a slice of it]; squared_norms: [B, K, n + 1, T], over everything that is
            normalised together.
    Returns:
        [B, K, n + 1, H or the slice].
    """
    lengths = squared_norms.clamp(min=torch.finfo(rows.dtype).tiny).sqrt()
    return (rows / lengths[..., None]).mean(dim=-2)


def summed(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over a group's ranks, with the same bits on each; in place."""
    if dist.get_world_size(group) > 1:
        dist.all_reduce(values, group=group)
    return values


def block_grams(
    taps: Sequence[Tensor],
    shape: tuple[int, ...],
    embed_method: EmbedMethod,
    feature_norm: FeatureNorm,
    groups: ProcessGroups,
    device: torch.device,
) -> Tensor:
    """Gram matrix of every block of a micro-batch from what this rank has of the tapped layers.

    Args:
        taps: one [B, K, n + 1, T, H / tensor-parallel ranks] per tapped layer on this stage, T positions as
            `PooledRows.places` says, in the network's dtype; no taps are zeros.
        shape: B, K, n + 1, T.
        feature_norm: `joint` scales the concatenated layers to length one (the authors' code), `per_layer` each
            layer before concatenation (length sqrt(number of layers); axolotl).
    Returns:
        float64 [B, K, n + 1, n + 1], the same on every rank of the replica.
    Communication: over the replica's ranks one all-reduce of B * K * (n + 1)^2 float64; with joint mean pooling
        one more of B * K * (n + 1) * G before it. With `per_layer`, over the tensor-parallel group one of
        B * K * (n + 1) * T for each tapped layer.
    Source: EBFT paper (arXiv 2603.12248), feature network; the authors' `hidden_state_method: concat`.
    """
    rows = [layer.to(torch.float64) for layer in taps]
    squares = [layer.square().sum(dim=-1) for layer in rows]
    if feature_norm == "per_layer":
        squares = [summed(layer, groups.tensor_parallel) for layer in squares]
        features = [pool_tokens(layer, norms) for layer, norms in zip(rows, squares, strict=True)]
    elif embed_method == "mean_pooling":
        # Pooling comes after normalisation, so a token's length over all layers has to be known before.
        none = torch.zeros(shape, dtype=torch.float64, device=device)
        norms = summed(sum(squares, none), groups.model_parallel)
        features = [pool_tokens(layer, norms) for layer in rows]
    else:
        features = [layer[..., 0, :] for layer in rows]
    none = torch.zeros((*shape[:-1], shape[-2]), dtype=torch.float64, device=device)
    gram = summed(sum(map(inner_products, features), none), groups.model_parallel)
    return unit_diagonal(gram) if feature_norm == "joint" and embed_method == "last_token" else gram
