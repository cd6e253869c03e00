"""Build the frozen feature network from a model's lower layers: whole on every data-parallel rank, or partitioned."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from ebft_mega.architecture.hf_config import Architecture, tapped_layers
from ebft_mega.architecture.partition import StageShape
from ebft_mega.attention.routes import AttentionRoute
from ebft_mega.config.entries import tapped_fractions
from ebft_mega.config.schema import RunConfig
from ebft_mega.features.gram import FeatureRecipe
from ebft_mega.features.network import FeatureNetwork
from ebft_mega.model.stage import Stage
from ebft_mega.model.weights.stage_weights import StageLoader, load_weights
from ebft_mega.model.weights.weight_sources import WeightSource
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.parallel.stage_module import StageRunner
from ebft_mega.parallel.zero import ShardedStage
from ebft_mega.types import DTYPES


@dataclass(frozen=True)
class FeatureSettings:
    """Which layers make a feature and how, and where the parameters lie."""

    layer_fractions: tuple[float, ...]  # relative depths to tap, as `tapped_fractions` gives them
    recipe: FeatureRecipe
    dtype: torch.dtype
    is_sharded: bool = False  # partitioned over the data-parallel group, gathered for each use; else whole
    sequence_parallel: bool = False
    attention: AttentionRoute | None = None  # None: the two-part route

    @classmethod
    def of(cls, config: RunConfig, attention: AttentionRoute | None, is_sharded: bool) -> "FeatureSettings":
        """The settings of a training run.

        Args:
            attention: the route that `train.attention` and the device choose.
            is_sharded: what `zero.feature_network` chooses.
        """
        return cls(
            layer_fractions=tapped_fractions(config),
            recipe=FeatureRecipe.of(config),
            dtype=DTYPES[config.train.dtype],
            is_sharded=is_sharded,
            sequence_parallel=config.parallel.sequence_parallel,
            attention=attention,
        )


def build_feature_network(
    architecture: Architecture,
    source: WeightSource,
    settings: FeatureSettings,
    groups: ProcessGroups,
    load: StageLoader = load_weights,
) -> FeatureNetwork:
    """Load this rank's part of the feature network.

    Args:
        load: fills the stage; `load_weights`, or what also says how far it has come.
    Communication: if it is partitioned, collective over the data-parallel group, whose first rank reads the weights.
    """
    taps = tapped_layers(settings.layer_fractions, architecture.num_hidden_layers)
    shape = StageShape.of_features(architecture, taps[-1], groups.pipeline_rank, groups.pipeline_size)

    def build_stage() -> Stage:
        return Stage(
            architecture,
            shape,
            groups,
            settings.dtype,
            sequence_parallel=settings.sequence_parallel,
            attention=settings.attention,
        )

    whole_parameters: Callable[[], AbstractContextManager[StageRunner]]
    if settings.is_sharded:
        sharded = ShardedStage(
            build_stage,
            lambda stage, gathered, is_reader: load(stage, source, gathered, is_reader),
            settings.dtype,
            groups,
        )
        stage, whole_parameters = sharded.module, sharded.whole_parameters
    else:
        stage = build_stage()
        load(stage, source, lambda _: nullcontext(), True)
        stage.to(groups.device).requires_grad_(False).eval()

        @contextmanager
        def whole_parameters() -> Iterator[StageRunner]:
            yield stage

    return FeatureNetwork(stage, whole_parameters, taps, settings.recipe)
