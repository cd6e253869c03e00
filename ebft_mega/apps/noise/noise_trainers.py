"""A trainer for each estimator that is compared: one policy, and feature networks and critics as runs have them."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from ebft_mega.apps.noise.estimator_specs import OPTIMAL_TOKEN_BASELINE, EstimatorSpec
from ebft_mega.apps.noise.noise_request import NoisePlan, NoiseRequest
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
from ebft_mega.train.step import observe_step
from ebft_mega.train.trainer import Trainer
from ebft_mega.types import TokenBatch


@dataclass(frozen=True)
class MeasuredEstimator:
    """An estimator and the trainer that computes its gradients, of steps of one row."""

    spec: EstimatorSpec
    trainer: Trainer

    @property
    def needs_logprobs(self) -> bool:
        """Whether it reads log-probabilities of what is drawn."""
        return self.spec.name == OPTIMAL_TOKEN_BASELINE or "logprobs" in self.trainer.rewarding.needs

    @property
    def critic_rank(self) -> int | None:
        """Numbers of a token's vector, whose means the sampling notes; None: the estimator reads no critic."""
        return None if self.trainer.critic is None else self.trainer.critic.rank


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
        fit_critic(trainer, request.warmup_batches, spec.label)
        found.append(MeasuredEstimator(spec, replace(trainer, config=request.of_one_row(spec))))
    return found


def fit_critic(trainer: Trainer, batches: int, label: str) -> None:
    """Let a trainer's critic learn from the first batches of its run, with unchanged weights; none without a critic.

    Communication: that of `observe_step`.
    """
    if trainer.critic is None:
        return
    loader = _loader(trainer.config, 0, trainer.config.train.global_batch_size)
    with closing(iter(loader)) as loaded:
        for step in track(range(batches), batches, f"fitting the critic of {label}"):
            observe_step(trainer, rows_of_step(next(loaded).rows, trainer.config, trainer.groups.device), step)


def by_distribution(estimators: Sequence[MeasuredEstimator]) -> list[list[MeasuredEstimator]]:
    """Group those that can share rollouts: what these are drawn from is the same, and so are the vectors of tokens."""
    groups: dict[object, list[MeasuredEstimator]] = {}
    ranks: dict[object, list[int]] = {}
    for own in estimators:
        sampling = (own.trainer.plan, own.trainer.sampling)
        known = ranks.setdefault(sampling, [])
        if own.critic_rank is not None and own.critic_rank not in known:
            known.append(own.critic_rank)
    for own in estimators:
        sampling = (own.trainer.plan, own.trainer.sampling)
        known = ranks[sampling]
        place = 0 if own.critic_rank is None else known.index(own.critic_rank)
        groups.setdefault((*sampling, place), []).append(own)
    return list(groups.values())


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
