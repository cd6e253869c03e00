"""The trainer of a run: the policy with its optimizer, and the frozen feature network, from a configuration."""

import logging

import torch
import torch.distributed as dist

from ebft_mega.architecture.hf_config import Architecture, tapped_layers
from ebft_mega.architecture.partition import StageShape
from ebft_mega.attention.routes import AttentionRoute, make_route
from ebft_mega.checkpoint.initial_model import open_weights
from ebft_mega.checkpoint.tensors import SavedState, restore_critic, restore_engine
from ebft_mega.config.entries import tapped_fractions
from ebft_mega.config.schema import RunConfig
from ebft_mega.critic.critic_factory import build_critic
from ebft_mega.errors import ConfigError, Problem
from ebft_mega.features.factory import FeatureSettings, build_feature_network
from ebft_mega.metrics.announcer import SILENT, Announcer
from ebft_mega.metrics.phase_memory import PhaseMemory
from ebft_mega.metrics.timers import PhaseTimers
from ebft_mega.model.stage import Stage
from ebft_mega.model.weights.stage_weights import announced_loader
from ebft_mega.model.weights.weight_sources import InitialWeights, RandomWeights, WeightSource
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.parallel.zero import OptimizerSettings, ZeroEngine, make_engine
from ebft_mega.planning.auto import choices, default_choices, needs_of_phases
from ebft_mega.planning.memory import Choices
from ebft_mega.planning.run_plan import RunPlan
from ebft_mega.rollout.generate import SamplingSettings
from ebft_mega.train.trainer import Trainer
from ebft_mega.types import DTYPES

logger = logging.getLogger(__name__)


def build_chosen_trainer(
    config: RunConfig,
    plan: RunPlan,
    groups: ProcessGroups,
    saved: SavedState | None = None,
    announcer: Announcer = SILENT,
) -> Trainer:
    """Build a run's trainer: what is `auto` in the configuration is chosen by the memory of the accelerators.

    Args:
        saved: what to resume from; None: the initial model.
        announcer: says what is built and how far it has come.
    Communication: collective over the world.
    """
    chosen = choices(config, plan, least_memory_bytes(groups.device))
    logger.info("chosen for this memory: %s", chosen)
    if saved is None:
        return build_trainer(config, plan.architecture, plan.feature_architecture, groups, chosen, announcer=announcer)
    architectures, table = (plan.architecture, plan.feature_architecture), saved.token_table()
    trainer = build_trainer(config, *architectures, groups, chosen, saved.weights, announcer, table)
    total = len(trainer.engine.state_kinds) * len(trainer.engine.parameter_shapes())
    words = f"restoring master weights and moments from {saved.tensors.directory}, {total} tensors"
    with announcer.phase(words, total, "tensors") as count:
        restore_engine(trainer.engine, trainer.stage, saved.tensors, saved.applied_updates, count)
    if saved.critic is not None:
        assert trainer.critic is not None, "the run takes the critic over"
        with announcer.phase(f"restoring what the token critic has learned from {saved.critic.batches} batches"):
            restore_critic(trainer.critic, trainer.own_channels, saved)
    return trainer


def build_trainer(
    config: RunConfig,
    architecture: Architecture,
    feature_architecture: Architecture,
    groups: ProcessGroups,
    chosen: Choices | None = None,
    policy_weights: WeightSource | None = None,
    announcer: Announcer = SILENT,
    token_table: torch.Tensor | None = None,
) -> Trainer:
    """Build the policy with its optimizer, and the feature network.

    Args:
        architecture, feature_architecture: of the policy and of the frozen network (often the same).
        chosen: what the memory of the accelerators decides; None: the choices where it is not known.
        policy_weights: the policy's weights in a checkpoint; None: the initial model. The feature network is always
            made of the initial model.
        announcer: says what is built and how far it has come.
        token_table: the token critic's vectors of a checkpoint; None: they are made, where there is a critic.
    Raises:
        ConfigError: `train.attention` names a route that this device does not have.
    Communication: collective over the world (weights are read by the first rank of each data-parallel group).
    """
    chosen = chosen or default_choices(config)
    attention = attention_route(config, architecture, groups.device)
    initial = initial_weights(config, architecture)
    features = None
    if config.uses_rollouts:
        route = attention_route(config, feature_architecture, groups.device)
        settings = FeatureSettings.of(config, route, chosen.feature_network_is_sharded)
        source = feature_weights(config, feature_architecture, initial)
        deepest = tapped_layers(settings.layer_fractions, feature_architecture.num_hidden_layers)[-1]
        words = f"building the feature network, {deepest} of {feature_architecture.num_hidden_layers} layers"
        with announcer.phase(words):
            load = announced_loader("the feature network", announcer)
            features = build_feature_network(feature_architecture, source, settings, groups, load)
    words = f"building the policy, {architecture.num_parameters:,} parameters, and its optimizer, ZeRO stage"
    with announcer.phase(f"{words} {config.zero.stage}"):
        engine = build_engine(config, architecture, policy_weights or initial, attention, groups, announcer)
    synchronize = torch.cuda.synchronize if groups.device.type == "cuda" else None
    return Trainer(
        config=config,
        plan=config.block_plan,
        sampling=SamplingSettings.of(config),
        groups=groups,
        engine=engine,
        feature_network=features,
        timers=PhaseTimers(synchronize, memory=PhaseMemory.of_device(groups.device)),
        reuse=chosen.reuse_rollout,
        critic=build_critic(config, architecture, initial, features, groups, announcer, token_table),
    )


def build_engine(
    config: RunConfig,
    architecture: Architecture,
    source: WeightSource,
    attention: AttentionRoute,
    groups: ProcessGroups,
    announcer: Announcer = SILENT,
) -> ZeroEngine[Stage]:
    """Build this rank's stage of the policy and its optimizer.

    Communication: collective over the data-parallel group, whose first rank reads the weights.
    """
    dtype = DTYPES[config.train.dtype]
    shape = StageShape.of_policy(architecture, groups.pipeline_rank, groups.pipeline_size)

    def build_stage() -> Stage:
        return Stage(
            architecture,
            shape,
            groups,
            dtype,
            activation_checkpointing=config.train.activation_checkpointing == "full",
            sequence_parallel=config.parallel.sequence_parallel,
            attention=attention,
        )

    load = announced_loader("the policy", announcer)
    return make_engine(
        build_stage,
        lambda stage, gathered, is_reader: load(stage, source, gathered, is_reader),
        Stage.parameter_roles,
        OptimizerSettings.of(config),
        groups,
    )


def attention_route(config: RunConfig, architecture: Architecture, device: torch.device) -> AttentionRoute:
    """The attention route that the configuration names."""
    name = config.train.attention
    try:
        return make_route(
            name,
            device,
            own_capacity=config.ebft.generate_max_len,
            head_dim=architecture.head_dim,
            is_repeatable=config.deterministic,
        )
    except ValueError as error:
        key = "train.attention"
        raise ConfigError([Problem(config.place(key), key, f"{name}, on a {device.type}: {error}", "auto")]) from None


def initial_weights(config: RunConfig, architecture: Architecture) -> InitialWeights:
    """The policy's initial weights: of `model.init_from`, or random ones of the run's seed."""
    if config.model.init_from is not None:
        return open_weights(config.model.init_from, architecture, hash_files=False)
    return RandomWeights(architecture, config.seed)


def feature_weights(config: RunConfig, architecture: Architecture, initial_policy: InitialWeights) -> InitialWeights:
    """The feature network's weights: the initial policy's, or those of the model that `ebft.feature_model` names."""
    ebft = config.ebft
    if ebft.feature_model is None:
        return initial_policy
    deepest = tapped_layers(tapped_fractions(config), architecture.num_hidden_layers)[-1]
    return open_weights(ebft.feature_model, architecture, deepest, hash_files=False)


def memory_needs(config: RunConfig, plan: RunPlan, groups: ProcessGroups) -> dict[str, str]:
    """Say for each phase what this rank needs by the plan, with what is `auto` as `build_chosen_trainer` chooses it.

    Communication: as `least_memory_bytes`.
    """
    return needs_of_phases(config, plan, groups.pipeline_rank, least_memory_bytes(groups.device))


def least_memory_bytes(device: torch.device) -> int | None:
    """Memory of the accelerator that has the least of all ranks'; None on CPUs, whose memory processes share.

    Communication: on accelerators one all-reduce of 8 bytes over the world.
    """
    if device.type != "cuda":
        return None
    least = torch.tensor(torch.cuda.get_device_properties(device).total_memory, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return int(least)
