"""A trainer for each estimator that is compared: one policy, and feature networks and critics as runs have them."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

from ebft_mega.apps.noise.noise_request import NoisePlan, NoiseRequest
from ebft_mega.apps.noise.shared_features import MeasuredEstimator, SharedFeatures, by_distribution
from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.checkpoint.initial_model import open_weights
from ebft_mega.config.entries import tapped_fractions
from ebft_mega.config.schema import RunConfig
from ebft_mega.critic.critic_factory import build_critic
from ebft_mega.data.rows.loader import BatchLoader
from ebft_mega.features.factory import FeatureSettings, build_feature_network
from ebft_mega.features.gram import FeatureRecipe
from ebft_mega.features.network import FeatureNetwork
from ebft_mega.io.progress_bar import track
from ebft_mega.lifecycle.build import attention_route, build_trainer, feature_weights, initial_weights
from ebft_mega.lifecycle.inputs import text_decoder
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.planning.datasets import open_training_rows
from ebft_mega.rollout.generate import SamplingSettings
from ebft_mega.train.loop import rows_of_step
from ebft_mega.train.loss_masks import loss_masks
from ebft_mega.train.trainer import Trainer
from ebft_mega.types import TokenBatch


def build_estimators(request: NoiseRequest, plan: NoisePlan, groups: ProcessGroups) -> list[MeasuredEstimator]:
    """Build the policy once, and for each estimator what its run has beside it; critics are fitted.

    Communication: none, in one process.
    """
    configs = [request.fitting(spec) for spec in request.specs]
    # An attention route may have room for the longest rollouts alone.
    longest = max(configs, key=lambda config: config.ebft.generate_max_len)
    first = build_trainer(
        longest,
        plan.architecture,
        plan.feature_architecture,
        groups,
        policy_weights=open_weights(request.model, plan.architecture),
    )
    networks: dict[object, FeatureNetwork] = {}
    found = []
    for spec, config in zip(request.specs, configs, strict=True):
        network = _network(config, plan.feature_architecture, groups, networks)
        initial = initial_weights(config, plan.architecture)
        trainer = replace(
            first,
            config=config,
            plan=config.block_plan,
            sampling=SamplingSettings.of(config),
            feature_network=network,
            reuse="off",
            critic=build_critic(config, plan.architecture, initial, network, groups),
            decode=text_decoder(config, _loader(config, 0, config.train.global_batch_size)),
        )
        found.append(MeasuredEstimator(spec, trainer))
    fit_critics([own for own in found if own.trainer.critic is not None], request.warmup_batches)
    return [replace(own, trainer=replace(own.trainer, config=request.of_one_row(own.spec))) for own in found]


def fit_critics(estimators: Sequence[MeasuredEstimator], batches: int) -> None:
    """Let critics learn from the first batches of their run, as `observe_step` does, with unchanged weights.

    Those that draw alike share the rollouts.

    Communication: none, in one process.
    """
    for sharing in by_distribution(estimators):
        trainer = sharing[0].trainer
        config, device = trainer.config, trainer.groups.device
        loader = _loader(config, 0, config.train.global_batch_size)
        words = f"fitting critics, n {trainer.plan.num_samples}, G {trainer.plan.generate_length}"
        with closing(iter(loader)) as loaded:
            for step in track(range(batches), batches, words):
                batch = rows_of_step(next(loaded).rows, config, device)
                micro_batches = batch.split(config.train.micro_batch_size)
                masks = loss_masks(micro_batches, trainer.plan, config, trainer.groups)
                shared = SharedFeatures.of(sharing, micro_batches, masks, trainer.sampling, step)
                for own in sharing:
                    assert own.trainer.critic is not None, "only those with a critic are fitted"
                    own.trainer.critic.learn(shared.judged[own.spec.label])


def rows_to_measure(request: NoiseRequest, trainer: Trainer) -> Sequence[TokenBatch]:
    """The measured rows, one by one, numbered as those of one global batch."""
    config = request.fitting(request.specs[0])
    loader = _loader(config, request.first_row, request.rows)
    with closing(iter(loader)) as loaded:
        return rows_of_step(next(loaded).rows, config, trainer.groups.device).split(1)


def _loader(config: RunConfig, first_row: int, rows: int) -> BatchLoader:
    return BatchLoader(open_training_rows(config), rows, next_row=first_row)


def _network(
    config: RunConfig, architecture: Architecture, groups: ProcessGroups, networks: dict[object, FeatureNetwork]
) -> FeatureNetwork:
    """The feature network of a run; runs that read the same layers share the layers, those that do all alike, all."""
    ebft = config.ebft
    layers = (ebft.feature_model, tapped_fractions(config))
    features = (*layers, ebft.generate_max_len, ebft.embed_method, ebft.feature_norm, ebft.layer_weights)
    if features not in networks:
        if layers not in networks:
            initial = initial_weights(config, architecture)
            settings = FeatureSettings.of(config, attention_route(config, architecture, groups.device), False)
            source = feature_weights(config, architecture, initial)
            networks[layers] = build_feature_network(architecture, source, settings, groups)
        networks[features] = replace(networks[layers], recipe=FeatureRecipe.of(config))
    return networks[features]
