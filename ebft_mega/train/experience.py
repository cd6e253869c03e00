"""Rewards and advantages of a micro-batch's rollouts."""

from dataclasses import dataclass

from torch import Tensor

from ebft_mega.block_plan import BlockPlan
from ebft_mega.config.entries import advantage_estimator, reward_terms
from ebft_mega.config.schema import RunConfig
from ebft_mega.extension.advantage_estimator import AdvantageEstimator
from ebft_mega.extension.reward_term import RewardTerm
from ebft_mega.objective.block_advantages import block_advantages
from ebft_mega.reward.block_inputs import BlockInputs
from ebft_mega.reward.block_rewards import block_rewards
from ebft_mega.reward.whitening import Whitening
from ebft_mega.types import Experience, Rollout


@dataclass(frozen=True)
class Rewarding:
    """How rollouts are rewarded, and what becomes of their rewards."""

    plan: BlockPlan
    whitening: Whitening
    terms: tuple[tuple[RewardTerm, float], ...]  # with their coefficients, in the order of their sum
    estimator: AdvantageEstimator

    @classmethod
    def of(cls, config: RunConfig) -> "Rewarding":
        """Take the entries that a configuration names, with their options."""
        return cls(config.block_plan, config.ebft.reward_whitening, reward_terms(config), advantage_estimator(config))


def make_experience(
    gram: Tensor, rollout: Rollout, rewarding: Rewarding, counted_blocks: Tensor | None = None
) -> Experience:
    """Rewards and advantages of a micro-batch's rollouts, from inner products of features alone.

    Args:
        gram: float64 [B, K, n + 1, n + 1].
        counted_blocks: bool [B, K], blocks that count; None: all.
    Communication: none; every rank of a replica has the same matrices.
    """
    inputs = BlockInputs.of(gram, rewarding.whitening, rewarding.plan)
    rewards = block_rewards(inputs, rewarding.terms)
    advantages = block_advantages(rewarding.estimator, rewards, rewarding.plan)
    if counted_blocks is not None:
        advantages = advantages.masked_fill(~counted_blocks[:, None], 0.0)
    return Experience(rollout, gram, rewards, advantages, counted_blocks)
