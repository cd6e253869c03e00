"""Load what an evaluation computes with: a policy, and frozen networks with a view for each length and map."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ebft_mega.apps.evaluation_inputs import EvaluationRequest, fractions_of, maps_of
from ebft_mega.apps.evaluation_request import EvaluationGrid
from ebft_mega.architecture.hf_config import Architecture, tapped_layers
from ebft_mega.architecture.partition import StageShape
from ebft_mega.attention.routes import AttentionRoute, make_route
from ebft_mega.checkpoint.initial_model import open_weights
from ebft_mega.config.entries import tapped_fractions
from ebft_mega.config.schema import RunConfig
from ebft_mega.evaluation.condition_grid import NamedView, ViewedFeatures
from ebft_mega.features import factory
from ebft_mega.features.gram import FeatureRecipe
from ebft_mega.features.views import ViewedNetwork
from ebft_mega.model.stage import Stage
from ebft_mega.model.weights.stage_weights import load_weights
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.planning.model_files import CheckedModel
from ebft_mega.types import DTYPES


def open_policy(
    directory: Path, architecture: Architecture, config: RunConfig, groups: ProcessGroups, longest: int | None = None
) -> Stage:
    """This rank's part of a model of a directory, without gradients, on this process's device.

    Args:
        longest: tokens of a rollout at most; None: those of the configuration.
    Communication: one gathering of names over the world.
    """
    route = _route(config, architecture, groups, longest or config.ebft.generate_max_len)
    shape = StageShape.of_policy(architecture, groups.pipeline_rank, groups.pipeline_size)
    policy = Stage(architecture, shape, groups, DTYPES[config.train.dtype], attention=route)
    load_weights(policy, open_weights(directory, architecture))
    return policy.to(groups.device).requires_grad_(False).eval()


def viewed_features(
    directory: Path,
    checked: Mapping[Path, CheckedModel],
    request: EvaluationRequest,
    grid: EvaluationGrid,
    groups: ProcessGroups,
) -> ViewedFeatures:
    """A frozen network with a view for each completion length and each of its maps.

    Communication: one gathering of names over the world.
    """
    maps, architecture = maps_of(directory, request, grid), checked[directory].architecture
    fractions, config = fractions_of(maps), grid.config
    deepest = tapped_layers(fractions, architecture.num_hidden_layers)[-1]
    route = _route(config, architecture, groups, grid.lengths[-1])
    settings = factory.FeatureSettings(fractions, FeatureRecipe.of(config), DTYPES[config.train.dtype], attention=route)
    source = open_weights(directory, architecture, deepest)
    network = factory.build_feature_network(architecture, source, settings, groups)
    names, features = [], []
    for choice in maps:
        for length in grid.lengths:
            names.append(NamedView(choice.name, length))
            recipe = replace(FeatureRecipe.of(choice.config), generate_length=length)
            features.append((tapped_fractions(choice.config), recipe))
    return ViewedFeatures(ViewedNetwork.of(network, features), tuple(names))


def _route(config: RunConfig, architecture: Architecture, groups: ProcessGroups, longest: int) -> AttentionRoute:
    return make_route(config.train.attention, groups.device, own_capacity=longest, head_dim=architecture.head_dim)
