"""Measure gradients of single rows by several estimators, each by the product's own backward pass.

Estimators that draw from the same distributions share rollouts, and those that read the same features share these: what
they differ in is what they make of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ebft_mega.apps.noise.adam_scale import adam_scale
from ebft_mega.apps.noise.estimator_specs import OPTIMAL_TOKEN_BASELINE, OTHERS
from ebft_mega.apps.noise.noise_request import NoisePlan, NoiseRequest
from ebft_mega.apps.noise.noise_trainers import build_estimators, rows_to_measure
from ebft_mega.apps.noise.other_baselines import (
    advantages_over,
    optimal_token_weights,
    prefix_weights,
    squared_probabilities,
)
from ebft_mega.apps.noise.shared_features import MeasuredEstimator, SharedFeatures, by_distribution
from ebft_mega.apps.noise.sign_projector import SignProjector
from ebft_mega.apps.noise.variance_parts import Array
from ebft_mega.cost.rollout_nodes import RolloutNodes
from ebft_mega.io.progress_bar import track
from ebft_mega.parallel.groups import connect, make_process_groups
from ebft_mega.rollout.score import ScoreRequest
from ebft_mega.train.experience import make_experiences
from ebft_mega.train.gradient_pass import learn
from ebft_mega.train.loss_masks import LossMasks, loss_masks
from ebft_mega.train.trainer import Trainer
from ebft_mega.types import CriticValues, Experience, TokenBatch


@dataclass(frozen=True)
class Measured:
    """Projections [E, X, R, D] of everything in `NoiseRequest.labels`, and the rollouts' nodes of each estimator."""

    projections: Array
    scaled: Array | None  # as Adam scales them; None: the model has no second moments
    nodes: tuple[RolloutNodes, ...]  # mean over rows and replicates


def measure_noise(request: NoiseRequest, plan: NoisePlan) -> Measured:
    """Fit the critics, then sample and measure every row as often as it is to be.

    Replicate r has the sampling noise of `--trace-noise r`: its seed is r higher.

    Raises:
        EbftError: a gradient is not finite.
    """
    groups = make_process_groups(connect())
    estimators = build_estimators(request, plan, groups)
    trainer = estimators[0].trainer
    scale = adam_scale(request.model, trainer.stage, trainer.config.train.betas[1])
    projector = SignProjector(trainer.stage, request.directions, scale)
    shape = (len(request.labels), request.rows, request.replicates, request.directions)
    projections = np.empty(shape)
    scaled = None if scale is None else np.empty(shape)
    nodes: dict[str, list[RolloutNodes]] = {label: [] for label in request.labels}
    rows = rows_to_measure(request, trainer)
    for index, row in enumerate(track(rows, len(rows), "measuring rows")):
        for replicate in range(request.replicates):
            found: dict[str, Tensor] = {}
            for sharing in by_distribution(estimators):
                measured = SharedRollouts(sharing, row, request.warmup_batches, replicate)
                for own in sharing:
                    nodes[own.spec.label] += measured.nodes
                    found |= measured.gradients(own, request.by_token, projector)
            gradients = torch.stack([found[label] for label in request.labels])
            projections[:, index, replicate] = projector.projections(gradients).cpu().numpy()
            if scaled is not None and (by_adam := projector.scaled_projections(gradients)) is not None:
                scaled[:, index, replicate] = by_adam.cpu().numpy()
    means = tuple(RolloutNodes.mean(nodes[own.spec.label]) for own in estimators)
    return Measured(projections, scaled, means)


class SharedRollouts:
    """Rollouts of one row with their features, for estimators that draw alike."""

    def __init__(self, sharing: Sequence[MeasuredEstimator], row: TokenBatch, step: int, replicate: int):
        """Sample, and measure features.

        Args:
            sharing: of one group of `by_distribution`.
            row: a batch of one row.
            step: of the sampling noise; replicate: added to its seed.
        """
        self._row, trainer = row, sharing[0].trainer
        self._masks: LossMasks | None = loss_masks([row], trainer.plan, trainer.config, trainer.groups)
        self._blocks = None if self._masks is None else self._masks.blocks
        sampling = replace(trainer.sampling, seed=trainer.sampling.seed + replicate)
        self._shared = SharedFeatures.of(sharing, [row], self._masks, sampling, step)

    @property
    def nodes(self) -> tuple[RolloutNodes, ...]:
        """Of the row."""
        forest = self._shared.sampled[0].rollout.forest
        return RolloutNodes.of_forest(forest.levels, forest.num_blocks)

    def gradients(self, own: MeasuredEstimator, by_token: bool, projector: SignProjector) -> dict[str, Tensor]:
        """An estimator's gradient as a vector, by its label; with `by_token` those of single tokens, too."""
        experience = self._experience(own)
        wanted = {own.spec.label: experience}
        if by_token:
            tokens = range(own.trainer.plan.generate_length)
            wanted |= {f"{own.spec.label}/token={t}": of_token(experience, t) for t in tokens}
        return {label: self._gradient(own.trainer, each, projector) for label, each in wanted.items()}

    def _gradient(self, trainer: Trainer, experience: Experience, projector: SignProjector) -> Tensor:
        learn(trainer, [self._row], [experience], [None], self._masks)
        shown: list[Tensor] = []
        trainer.engine.drop_gradient(lambda parts: shown.append(projector.flattened(parts)))
        return shown[0]

    def _experience(self, own: MeasuredEstimator) -> Experience:
        """Rewards and advantages, by the estimator of the configuration or by one of others."""
        trainer, judged = own.trainer, self._shared.judged.get(own.spec.label)
        grams = self._shared.grams[id(trainer.feature_network)]
        values = None if judged is None else judged.values
        (experience,) = make_experiences(
            trainer.rewarding, [self._row], self._shared.sampled, grams, self._blocks, trainer.groups.device, values
        )
        if own.spec.name not in OTHERS:
            return experience
        ebft = trainer.config.ebft
        weights = self._other_weights(own)
        advantages = advantages_over(weights, grams[0], ebft.alignment_coef, ebft.diversity_coef)
        if self._blocks is not None:
            advantages = advantages.masked_fill(~self._blocks[0][:, None, :, None], 0.0)
        return replace(experience, advantages=advantages)

    def _other_weights(self, own: MeasuredEstimator) -> Tensor:
        (sampled,), trainer = self._shared.sampled, own.trainer
        if own.spec.name != OPTIMAL_TOKEN_BASELINE:
            return prefix_weights(sampled.rollout.tokens)
        assert sampled.logprobs is not None, "the estimator needs them"
        temperature, documents = trainer.config.ebft.temperature, self._row.documents
        request = ScoreRequest(self._row.tokens, sampled.rollout.forest, False, temperature, documents)
        return optimal_token_weights(sampled.logprobs, squared_probabilities(trainer.stage, request, trainer.plan))


def of_token(experience: Experience, token: int) -> Experience:
    """What one token of every rollout adds to the gradient: its advantages, and the critic's expectation before it."""
    advantages = experience.advantages
    if advantages.dim() == 3:
        length = experience.rollout.tokens.shape[-1]
        advantages = advantages[..., None].expand(*advantages.shape, length)
    chosen = torch.arange(advantages.shape[-1], device=advantages.device) == token
    critic = experience.critic
    if critic is not None:
        critic = CriticValues(
            advantages=critic.advantages.where(chosen, 0.0),
            directions=critic.directions.where(chosen[:, None], 0.0),
            expected=critic.expected.where(chosen, 0.0),
        )
    return replace(experience, advantages=advantages.where(chosen, 0.0), critic=critic)
