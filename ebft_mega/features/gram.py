"""Gram matrix of each block's rollout and target features, summed over ranks: features never leave their rank.

A feature is the concatenation of tapped layers, normalised; its inner products are sums over layers and over slices of
the hidden dimension. So no rank ever holds a whole feature: each sums over its own layers and slice, and what is
all-reduced is one `[n + 1, n + 1]` matrix per block. Where vectors are scaled before those sums, their squared lengths
are all-reduced first: with `per_layer` one per layer and vector, with `joint` and a map that normalises tokens one per
token. Features are rows 0..n-1 for the samples and row n for the target. Everything after the
hidden states is float64: whitening tells a duplicate from a near-duplicate at a relative eigenvalue of 1e-10.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ebft_mega.block_plan import BlockPlan
from ebft_mega.config.entries import feature_map
from ebft_mega.config.schema import RunConfig
from ebft_mega.extension.feature_map import FeatureMap
from ebft_mega.model.strided_attention import ReadRows
from ebft_mega.parallel.groups import ProcessGroups

FeatureNorm = Literal["joint", "per_layer"]


@dataclass(frozen=True)
class FeatureRecipe:
    """How features are made of the rows of tapped layers."""

    map: FeatureMap
    # `joint` scales the concatenated layers to length one (the authors' code), `per_layer` each layer before
    # concatenation (length sqrt(number of layers); axolotl): of each token, or of the pooled vectors, as the map says.
    norm: FeatureNorm = "joint"

    @classmethod
    def of(cls, config: RunConfig) -> "FeatureRecipe":
        """The recipe of a configuration."""
        return cls(feature_map(config), config.ebft.feature_norm)

    @property
    def scales_tokens(self) -> bool:
        """Whether vectors are scaled before they are pooled."""
        return self.map.normalises == "tokens"


@dataclass(frozen=True)
class PooledRows:
    """Which rows of a packed pass (the document, then all rollouts whole) features are made of."""

    read: ReadRows  # each row once
    places: Tensor  # int64 [K, n + 1, T], which of those rows; the target's window is in the document

    @classmethod
    def of(cls, plan: BlockPlan, window: range, device: torch.device) -> "PooledRows":
        """The rows of a plan's features.

        Args:
            window: T positions of each window of G, the last ones (`FeatureMap.positions`).
        """
        tokens = len(window)
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


def scaled(vectors: Tensor, squared_norms: Tensor) -> Tensor:
    """Vectors divided by their lengths; a zero vector stays zero.

    Args:
        vectors: [..., H or a slice of it]; squared_norms: [...], over everything that is normalised together.
    """
    return vectors / squared_norms.clamp(min=torch.finfo(vectors.dtype).tiny).sqrt()[..., None]


def summed(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over a group's ranks, with the same bits on each; in place."""
    if dist.get_world_size(group) > 1:
        dist.all_reduce(values, group=group)
    return values


def block_grams(
    taps: Sequence[Tensor],
    shape: tuple[int, ...],
    recipe: FeatureRecipe,
    groups: ProcessGroups,
    device: torch.device,
) -> Tensor:
    """Gram matrix of every block of a micro-batch from what this rank has of the tapped layers.

    Args:
        taps: one [B, K, n + 1, T, H / tensor-parallel ranks] per tapped layer on this stage, T positions as
            `PooledRows.places` says, in the network's dtype; no taps are zeros.
        shape: B, K, n + 1, T.
    Returns:
        float64 [B, K, n + 1, n + 1], the same on every rank of the replica.
    Communication: over the replica's ranks one all-reduce of B * K * (n + 1)^2 float64; with a joint norm of tokens
        one more of B * K * (n + 1) * T before it. With `per_layer`, over the tensor-parallel group one for each
        tapped layer: of B * K * (n + 1) * T where tokens are scaled, else of B * K * (n + 1).
    Source: EBFT paper (arXiv 2603.12248), feature network; the authors' `hidden_state_method: concat`.
    """
    rows = [layer.to(torch.float64) for layer in taps]
    features = _features_per_layer(rows, recipe, groups) if recipe.norm == "per_layer" else None
    if features is None:
        features = _features_of_joint_norm(rows, shape, recipe, groups, device)
    none = torch.zeros((*shape[:-1], shape[-2]), dtype=torch.float64, device=device)
    gram = summed(sum(map(inner_products, features), none), groups.model_parallel)
    return unit_diagonal(gram) if recipe.norm == "joint" and not recipe.scales_tokens else gram


def _features_per_layer(rows: Sequence[Tensor], recipe: FeatureRecipe, groups: ProcessGroups) -> Iterator[Tensor]:
    """Each layer's vectors, pooled and scaled by themselves: what this rank has of them, [B, K, n + 1, X]."""
    for layer in rows:
        vectors = layer if recipe.scales_tokens else recipe.map.pool(layer)
        unit = scaled(vectors, summed(vectors.square().sum(dim=-1), groups.tensor_parallel))
        # Contiguous, as a mean is: the order of sums in a product follows strides.
        yield recipe.map.pool(unit) if recipe.scales_tokens else unit.contiguous()


def _features_of_joint_norm(
    rows: Sequence[Tensor], shape: tuple[int, ...], recipe: FeatureRecipe, groups: ProcessGroups, device: torch.device
) -> Iterator[Tensor]:
    """Each layer's pooled vectors; of a map that normalises pooled vectors not scaled yet."""
    if not recipe.scales_tokens:
        yield from map(recipe.map.pool, rows)
        return
    # Pooling comes after normalisation, so a token's length over all layers has to be known before.
    none = torch.zeros(shape, dtype=torch.float64, device=device)
    norms = summed(sum((layer.square().sum(dim=-1) for layer in rows), none), groups.model_parallel)
    yield from (recipe.map.pool(scaled(layer, norms)) for layer in rows)
