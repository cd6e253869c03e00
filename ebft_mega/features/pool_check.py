"""Try a feature map on a few numbers on the CPU, before a run begins."""

import torch
from torch import Tensor

from ebft_mega.config.schema import RunConfig
from ebft_mega.errors import ConfigError
from ebft_mega.extension.entry_fault import EntryFaultError
from ebft_mega.features.gram import FeatureRecipe, inner_products

_HIDDEN, _SLICE = 6, 2  # channels of the rows, and of a slice of them


def check_pooling(config: RunConfig) -> None:
    """Refuse a feature map of a plugin whose `pool` does not hold its contract.

    Beside shape, dtype and finite values: whether slices of the hidden dimension, and rows, blocks and features by
    themselves, give what they give as parts of the whole. Without rollouts nothing is tried.

    Raises:
        ConfigError: it does not, with the places of the key and of the map.
    Communication: none; every rank finds the same.
    """
    if not config.uses_rollouts:
        return
    recipe = FeatureRecipe.of(config)
    if recipe.map.is_built_in():
        return
    try:
        _try(recipe, config.ebft.n_samples_per_prompt + 1)
    except EntryFaultError as fault:
        raise ConfigError([recipe.problem_of(fault)]) from fault


def _try(recipe: FeatureRecipe, features: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 2, features, len(recipe.window), _HIDDEN)
    rows = torch.randn(shape, generator=generator, dtype=torch.float64)
    before = rows.clone()
    whole = recipe.pool(rows)
    if not torch.equal(rows, before):
        raise EntryFaultError(recipe.map, "that pool changes the rows that it is given", "rows as they were")
    # Of slices of the hidden dimension only sums of inner products are ever put together.
    slices = (recipe.pool(part) for part in before.split(_SLICE, dim=-1))
    of_slices = sum((inner_products(part) for part in slices), torch.zeros(()))
    _require_equal(recipe, of_slices, inner_products(whole), "channels of the hidden dimension")
    _require_equal(recipe, recipe.pool(before[:1]), whole[:1], "rows of the batch")
    _require_equal(recipe, recipe.pool(before[:, 1:]), whole[:, 1:], "blocks")
    _require_equal(recipe, recipe.pool(before[:, :, -1:]), whole[:, :, -1:], "features of a block")


def _require_equal(recipe: FeatureRecipe, part: Tensor, of_whole: Tensor, of_what: str) -> None:
    if not torch.allclose(part, of_whole, rtol=1e-9, atol=1e-12):
        found = f"that some {of_what} give something else without the others"
        raise EntryFaultError(recipe.map, found, f"a vector in which {of_what} do not depend on each other")
