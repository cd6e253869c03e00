"""Gram matrix of each block's rollout and target features, summed over ranks: features never leave their rank.

A feature is the concatenation of tapped layers, normalised; its inner products are sums over layers, each as often as
its weight says, and over slices of the hidden dimension. So no rank ever holds a whole feature: each sums over its own
layers and slice, and what is all-reduced is one `[n + 1, n + 1]` matrix per block. Where vectors are scaled before
those sums, their squared lengths are all-reduced first: with `per_layer` one per layer and vector, with `joint` and a
map that normalises tokens one per token. Features are rows 0..n-1 for the samples and row n for the target. Everything
after the hidden states is float64: whitening tells a duplicate from a near-duplicate at a relative eigenvalue of 1e-10.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ebft_mega.block_plan import BlockPlan
from ebft_mega.config.entries import feature_map
from ebft_mega.config.schema import RunConfig
from ebft_mega.errors import Problem
from ebft_mega.extension.entry_fault import EntryFaultError, answer_of, require_tensor
from ebft_mega.extension.feature_map import FeatureMap
from ebft_mega.features.own_features import LayerFeatures, OwnFeatures
from ebft_mega.forest import Forest
from ebft_mega.model.strided_attention import ReadRows
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.rollout.packed_order import document_rows

FeatureNorm = Literal["joint", "per_layer"]
KEY = "ebft.embed_method"


@dataclass(frozen=True)
class FeatureRecipe:
    """How features are made of the rows of tapped layers."""

    map: FeatureMap
    generate_length: int  # G
    # `joint` scales the concatenated layers to length one (the authors' code), `per_layer` each layer before
    # concatenation (length sqrt(number of layers); axolotl): of each token, or of the pooled vectors, as the map says.
    norm: FeatureNorm = "joint"
    # How often the inner products of each tapped layer count, from the shallowest to the deepest; None: once. Features
    # are normalised as without weights.
    layer_weights: tuple[float, ...] | None = None
    place: str = KEY  # where the configuration names the map

    @classmethod
    def of(cls, config: RunConfig) -> "FeatureRecipe":
        """The recipe of a configuration."""
        ebft = config.ebft
        place = config.place(KEY)
        return cls(feature_map(config), ebft.generate_max_len, ebft.feature_norm, ebft.layer_weights, place)

    @property
    def scales_tokens(self) -> bool:
        """Whether vectors are scaled before they are pooled."""
        return self.map.normalises == "tokens"

    @property
    def window(self) -> range:
        """T positions of each window of G, the last ones."""
        return self.map.positions(self.generate_length)

    def pool(self, rows: Tensor) -> Tensor:
        """What the map makes of rows [B, K, n + 1, T, H or a slice], checked: float64 [B, K, n + 1, X].

        Raises:
            EntryFaultError: the map does not hold its contract.
        Communication: none; for a map that is not one of the package's own, the host waits for the device.
        """
        width = self.map.vectors(self.generate_length) * rows.shape[-1]
        shape = (*rows.shape[:-2], width)
        vectors = answer_of(self.map, lambda: self.map.pool(rows), f"float64 {list(shape)}")
        require_tensor(self.map, vectors, {"[B, K, n + 1, vectors * H]": shape}, rows)
        if not self.map.is_built_in():
            self._require_finite(vectors, rows)
            if self.map.is_mean_of_tokens and not torch.allclose(vectors, rows.mean(dim=-2), equal_nan=True):
                raise EntryFaultError(self.map, "another vector", "the mean of all rows, as is_mean_of_tokens says")
        return vectors

    def problem_of(self, fault: EntryFaultError) -> Problem:
        """A fault of the map with the places of the key that names it, and of the map itself."""
        return Problem(fault.place, KEY, fault.found, fault.expected).within(self.place)

    def _require_finite(self, vectors: Tensor, rows: Tensor) -> None:
        """Refuse vectors that are not finite though the rows are: of others the block is marked."""
        wrong = ~vectors.isfinite().all(dim=-1) & rows.isfinite().flatten(-2).all(dim=-1)
        places = wrong.nonzero().tolist()
        if places:
            where = ", ".join(f"{word} {i}" for word, i in zip(("row", "block", "feature"), places[0], strict=True))
            found = f"a vector that is not finite at {where} of a micro-batch, {len(places)} vectors in all"
            raise EntryFaultError(self.map, found, "finite vectors of finite rows")


@dataclass(frozen=True)
class PooledRows:
    """Which rows of a packed pass (whole rows of text, then all nodes) features are made of."""

    read: ReadRows  # each row once
    places: Tensor  # int64 [B, K, n + 1, T], which of those rows; the target's window is in the document

    @classmethod
    def of(cls, plan: BlockPlan, window: range, forest: Forest) -> "PooledRows":
        """The rows of a micro-batch's features.

        Args:
            window: T positions of each window of G, the last ones (`FeatureMap.positions`).
        """
        levels = forest.levels[window.start :]
        device, rows = levels[0].first.device, forest.num_rows
        document, targets = _target_windows(plan, window, device)
        before = rows * plan.sequence_length + forest.up_to(window.start).num_nodes
        nodes = torch.arange(before, before + sum(map(len, levels)), device=device)
        positions = torch.cat((document_rows(document, rows, plan.sequence_length), nodes))
        in_row = torch.arange(rows, device=device)[:, None, None] * len(document) + targets  # [B, K, T]
        sampled, end = [], rows * len(document)
        for index, level in enumerate(levels):
            own = torch.arange(end, end + len(level), device=device)
            stems = in_row[..., index].flatten()[level.anchors[level.stems]]
            sampled.append(level.spread(level.joined(own, stems)))
            end += len(level)
        places = torch.cat((forest.by_sample(sampled).transpose(1, 2), in_row[:, :, None]), dim=2)
        return cls(ReadRows(_window_positions(plan, window), len(levels), positions), places)


@lru_cache(maxsize=16)
def _window_positions(plan: BlockPlan, window: range) -> tuple[int, ...]:
    """Positions of a row that are in any target's window, each once: windows overlap where the stride is smaller."""
    return tuple(sorted({anchor + t for anchor in plan.anchors for t in window}))


@lru_cache(maxsize=16)
def _target_windows(plan: BlockPlan, window: range, device: torch.device) -> tuple[Tensor, Tensor]:
    """Those positions on the device, and which of them are in each window: int64 [K, T]."""
    document = _window_positions(plan, window)
    place = {position: index for index, position in enumerate(document)}
    targets = torch.tensor([[place[anchor + t] for t in window] for anchor in plan.anchors], device=device)
    return torch.tensor(document, device=device), targets


def inner_products(features: Tensor) -> Tensor:
    """[..., n + 1, H] -> [..., n + 1, n + 1], symmetric to the last bit."""
    gram = features @ features.transpose(-1, -2)
    return (gram + gram.transpose(-1, -2)) / 2


def unit_diagonal(gram: Tensor, squares: Tensor) -> Tensor:
    """The Gram matrix of the same features scaled to length one; a zero feature stays zero.

    Args:
        squares: squared lengths to divide by, [..., n + 1]; without weights of layers the diagonal.
    """
    norms = squares.clamp(min=torch.finfo(gram.dtype).tiny).sqrt()
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
    weights: Sequence[float] | None = None,
    faults: list[EntryFaultError] | None = None,
    own: list[OwnFeatures] | None = None,
) -> Tensor:
    """Gram matrix of every block of a micro-batch from what this rank has of the tapped layers.

    Args:
        taps: one [B, K, n + 1, T, H / tensor-parallel ranks] per tapped layer on this stage, T positions as
            `PooledRows.places` says, in the network's dtype; no taps are zeros.
        shape: B, K, n + 1, T.
        weights: those of `recipe.layer_weights` that belong to these taps; None: there are none.
        faults: takes what the map does against its contract; vectors are 0 then. Other ranks, which may have no tapped
            layer, wait in the collectives. None: it is raised.
        own: takes this rank's part of the features; None: it is not wanted.
    Returns:
        float64 [B, K, n + 1, n + 1], the same on every rank of the replica.
    Communication: over the replica's ranks one all-reduce of B * K * (n + 1)^2 float64; with a joint norm of tokens
        one more of B * K * (n + 1) * T before it. With `per_layer`, over the tensor-parallel group one for each
        tapped layer: of B * K * (n + 1) * T where tokens are scaled, else of B * K * (n + 1). With weights and a joint
        norm of pooled vectors B * K * (n + 1) more in the all-reduce of the matrices: the squared lengths without
        weights, which the weighted matrix does not hold.
    Source: EBFT paper (arXiv 2603.12248), feature network; the authors' `hidden_state_method: concat`.
    """
    rows = [layer.to(torch.float64) for layer in taps]
    if recipe.norm == "per_layer":
        features = _features_per_layer(rows, recipe, groups, faults)
    else:
        features = _features_of_joint_norm(rows, shape, recipe, groups, device, faults)
    scales_sums = recipe.norm == "joint" and not recipe.scales_tokens
    gram = torch.zeros((*shape[:-1], shape[-2]), dtype=torch.float64, device=device)
    squares = torch.zeros(shape[:-1], dtype=torch.float64, device=device)
    layers: list[LayerFeatures] = []
    for index, layer in enumerate(features):
        products, weight = inner_products(layer.vectors), 1.0 if weights is None else weights[index]
        gram = gram + (products if weights is None else weight * products)
        if weights is not None:
            squares = squares + products.diagonal(dim1=-2, dim2=-1)
        if own is not None:
            layers.append(layer.times(weight**0.5))
    if not scales_sums:
        gram = summed(gram, groups.model_parallel)
    elif weights is None:
        gram = summed(gram, groups.model_parallel)
        squares = gram.diagonal(dim1=-2, dim2=-1)
    else:
        together = summed(torch.cat((gram, squares[..., None]), dim=-1), groups.model_parallel)
        gram, squares = together[..., :-1], together[..., -1]
    if own is not None:
        if scales_sums:
            layers = [LayerFeatures(scaled(layer.vectors, squares)) for layer in layers]
        is_mean, length = recipe.map.is_mean_of_tokens, recipe.generate_length
        own.append(OwnFeatures.of(layers, shape[:-1], length, is_mean, device))
    return unit_diagonal(gram, squares) if scales_sums else gram


def _features_per_layer(
    rows: list[Tensor], recipe: FeatureRecipe, groups: ProcessGroups, faults: list[EntryFaultError] | None
) -> Iterator[LayerFeatures]:
    """Each layer's vectors, pooled and scaled by themselves; the rows are used up."""
    while rows:
        layer = rows.pop(0)
        vectors = layer if recipe.scales_tokens else _pooled(layer, recipe, faults)
        unit = scaled(vectors, summed(vectors.square().sum(dim=-1), groups.tensor_parallel))
        if recipe.scales_tokens:
            yield _features_of(unit, recipe, faults)
        else:
            # Contiguous, as a mean is: the order of sums in a product follows strides.
            yield LayerFeatures(unit.contiguous())


def _features_of_joint_norm(
    rows: list[Tensor],
    shape: tuple[int, ...],
    recipe: FeatureRecipe,
    groups: ProcessGroups,
    device: torch.device,
    faults: list[EntryFaultError] | None,
) -> Iterator[LayerFeatures]:
    """Each layer's pooled vectors; of a map that normalises pooled vectors not scaled yet. The rows are used up."""
    if not recipe.scales_tokens:
        while rows:
            yield LayerFeatures(_pooled(rows.pop(0), recipe, faults))
        return
    # Pooling comes after normalisation, so a token's length over all layers has to be known before.
    none = torch.zeros(shape, dtype=torch.float64, device=device)
    norms = summed(sum((layer.square().sum(dim=-1) for layer in rows), none), groups.model_parallel)
    while rows:
        yield _features_of(scaled(rows.pop(0), norms), recipe, faults)


def _features_of(unit: Tensor, recipe: FeatureRecipe, faults: list[EntryFaultError] | None) -> LayerFeatures:
    """Of a layer's scaled rows; what tokens add to a mean is known one by one."""
    return LayerFeatures(_pooled(unit, recipe, faults), unit if recipe.map.is_mean_of_tokens else None)


def _pooled(rows: Tensor, recipe: FeatureRecipe, faults: list[EntryFaultError] | None) -> Tensor:
    """`FeatureRecipe.pool`, or zeros and a fault more."""
    try:
        return recipe.pool(rows)
    except EntryFaultError as fault:
        if faults is None:
            raise
        faults.append(fault)
        return rows.new_zeros(*rows.shape[:-2], rows.shape[-1])
