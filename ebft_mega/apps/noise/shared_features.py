"""Rollouts and features that several estimators share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ebft_mega.apps.noise.estimator_specs import OPTIMAL_TOKEN_BASELINE, EstimatorSpec
from ebft_mega.critic.fitted_critic import CriticStep
from ebft_mega.features.own_features import OwnFeatures
from ebft_mega.rollout.generate import Sampled, SamplingSettings, generate_rollouts
from ebft_mega.train.loss_masks import LossMasks
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


def by_distribution(estimators: Sequence[MeasuredEstimator]) -> list[list[MeasuredEstimator]]:
    """Group those that can share rollouts: what these are drawn from is the same, and so are the vectors of tokens."""
    ranks: dict[object, list[int]] = {}
    for own in estimators:
        known = ranks.setdefault((own.trainer.plan, own.trainer.sampling), [])
        if own.critic_rank is not None and own.critic_rank not in known:
            known.append(own.critic_rank)
    groups: dict[object, list[MeasuredEstimator]] = {}
    for own in estimators:
        sampling = (own.trainer.plan, own.trainer.sampling)
        place = 0 if own.critic_rank is None else ranks[sampling].index(own.critic_rank)
        groups.setdefault((*sampling, place), []).append(own)
    return list(groups.values())


@dataclass(frozen=True)
class SharedFeatures:
    """What was sampled for some rows, and the features of it."""

    sampled: list[Sampled]  # by micro-batch
    grams: dict[int, list[Tensor]]  # by the identity of the feature network, then by micro-batch
    judged: dict[str, CriticStep]  # by the label of the estimator, of those with a critic

    @classmethod
    def of(
        cls,
        sharing: Sequence[MeasuredEstimator],
        micro_batches: Sequence[TokenBatch],
        masks: LossMasks | None,
        sampling: SamplingSettings,
        step: int,
    ) -> "SharedFeatures":
        """Sample once, and measure features once with each feature network.

        Args:
            sharing: a group of `by_distribution`.
            masks: of the micro-batches.
            sampling: of the group, maybe with another seed; step: of the sampling noise.
        Communication: none, in one process.
        """
        trainer = sharing[0].trainer
        critics = {own.spec.label: own.trainer.critic for own in sharing if own.trainer.critic is not None}
        with trainer.policy() as policy:
            sampled = generate_rollouts(
                policy,
                micro_batches,
                trainer.plan,
                sampling,
                step,
                with_logprobs=any(own.needs_logprobs for own in sharing),
                table=next((critic.table for critic in critics.values()), None),
            )
        rollouts = [item.rollout for item in sampled]
        blocks = None if masks is None else masks.blocks
        grams: dict[int, list[Tensor]] = {}
        judged = {label: critic.of_step(micro_batches, sampled, blocks) for label, critic in critics.items()}
        for network in {id(own.trainer.feature_network): own.trainer.feature_network for own in sharing}.values():
            assert network is not None, "there are rollouts"
            of_network = [own.spec.label for own in sharing if own.trainer.feature_network is network]
            take = _taken_by([judged[label] for label in of_network if label in judged])
            grams[id(network)] = network.grams(micro_batches, rollouts, trainer.plan, take)
        return cls(sampled, grams, judged)


def _taken_by(steps: Sequence[CriticStep]) -> Callable[[int, OwnFeatures], None] | None:
    """What hands features to several critics; None: there are none."""

    def take(index: int, features: OwnFeatures) -> None:
        for step in steps:
            step.take(index, features)

    return take if steps else None
