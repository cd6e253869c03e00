"""Loading a model's lower layers as a frozen feature network, whole on every replica rank or partitioned."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ebft_mega.architecture.hf_config import Architecture, tapped_layers
from ebft_mega.architecture.partition import StageShape
from ebft_mega.attention.routes import AttentionRoute
from ebft_mega.features.gram import EmbedMethod, FeatureNorm
from ebft_mega.features.network import FeatureNetwork
from ebft_mega.model.stage import Stage
from ebft_mega.model.weights.huggingface import WeightSource, load_weights
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.parallel.optimizer import StageRunner
from ebft_mega.parallel.zero import ShardedStage


@dataclass(frozen=True)
class FeatureSettings:
    """How a model becomes a feature network, and how it is kept."""

    layer_fractions: tuple[float, ...]  # relative depths to tap, as `ebft.feature_layers`
    embed_method: EmbedMethod
    feature_norm: FeatureNorm
    dtype: torch.dtype
    is_sharded: bool = False  # over the data-parallel group, gathered for each use; else whole on every rank
    sequence_parallel: bool = False
    attention: AttentionRoute | None = None  # None: the two-part route


def build_feature_network(
    architecture: Architecture, source: WeightSource, settings: FeatureSettings, groups: ProcessGroups
) -> FeatureNetwork:
    """Load this rank's part of the feature network.

    Communication: if it is sharded, collective over the data-parallel group, whose first rank reads the weights.
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

        def load(
            stage: nn.Module, gathered: Callable[[nn.Parameter], AbstractContextManager[Any]], is_reader: bool
        ) -> None:
            assert isinstance(stage, Stage)
            load_weights(stage, source, gathered, is_reader)

        sharded = ShardedStage(build_stage, load, settings.dtype, groups)
        stage, whole_parameters = sharded.module, sharded.whole_parameters
        assert isinstance(stage, Stage)
    else:
        stage = build_stage()
        load_weights(stage, source)
        stage.to(groups.device).requires_grad_(False).eval()

        @contextmanager
        def whole_parameters() -> Iterator[StageRunner]:
            yield stage

    return FeatureNetwork(stage, whole_parameters, taps, settings.embed_method, settings.feature_norm)
