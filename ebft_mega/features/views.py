"""Several features of one packed pass: other maps, layers and norms, and the first tokens of longer completions.

A view is a feature network whose stage is another one's: it reads some of its taps, and of each window the first G
positions. What a causal network computes at those does not depend on the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ebft_mega.architecture.hf_config import tapped_layers
from ebft_mega.block_plan import BlockPlan
from ebft_mega.features.gram import FeatureRecipe, PooledRows
from ebft_mega.features.network import FeatureNetwork
from ebft_mega.types import Rollout, TokenBatch


@dataclass(frozen=True)
class ViewedNetwork:
    """A feature network and the features that are made of it."""

    network: FeatureNetwork  # taps every layer that a view reads
    views: tuple[FeatureNetwork, ...]  # with its stage, and taps and recipe of their own

    @classmethod
    def of(
        cls, network: FeatureNetwork, features: Sequence[tuple[tuple[float, ...], FeatureRecipe]]
    ) -> "ViewedNetwork":
        """A network with views.

        Args:
            network: which taps the layers of all of them.
            features: of each view the relative depths of its layers, and its recipe.
        """
        num_layers = network.stage.architecture.num_hidden_layers
        views = (
            replace(network, taps=tapped_layers(fractions, num_layers), recipe=recipe) for fractions, recipe in features
        )
        return cls(network, tuple(views))

    def window(self, generate_length: int) -> range:
        """The positions of a window of `generate_length` tokens from the first that a view reads on."""
        return range(min(view.recipe.window.start for view in self.views), generate_length)

    @torch.no_grad()
    def grams(
        self, micro_batches: Sequence[TokenBatch], rollouts: Sequence[Rollout], plan: BlockPlan
    ) -> list[list[Tensor]]:
        """Inner products of every view's features, per micro-batch; one packed pass for all views.

        Args:
            plan: of the longest completions, as the rollouts are.
        Returns:
            By view, as `FeatureNetwork.grams`. A block is marked for all lengths where a logit of its longest
            completions was not finite.
        Raises:
            EntryError: as `FeatureNetwork.grams`.
        Communication: that of `FeatureNetwork.tapped_rows`, and for each view that of `grams_of_rows`.
        Memory: the rows of all tapped layers that are read, each once, of all micro-batches; spread for one view of one
            micro-batch at a time.
        """
        window = self.window(plan.generate_length)
        pooled = [PooledRows.of(plan, window, rollout.forest) for rollout in rollouts]
        tapped = self.network.tapped_rows(micro_batches, rollouts, plan, pooled, spread=False)
        found: list[list[Tensor]] = []
        for view in self.views:
            grams: list[Tensor] = []
            for rows, read, rollout in zip(tapped, pooled, rollouts, strict=True):
                places = read.places[..., [position - window.start for position in view.recipe.window]]
                own = [each[places] for each in self._own_rows(view, rows)]
                tokens = rollout.tokens[..., : view.recipe.generate_length]
                grams += view.grams_of_rows([own], [replace(read, places=places)], [replace(rollout, tokens=tokens)])
            found.append(grams)
        return found

    def _own_rows(self, view: FeatureNetwork, rows: Sequence[Tensor]) -> list[Tensor]:
        """Of this stage's tapped rows those of a view's layers; one that two fractions name counts twice."""
        shape = self.network.stage.shape
        here = shape.taps_within(self.network.taps)
        return [rows[here.index(tap)] for tap in shape.taps_within(view.taps)]
