"""Rewards and advantages by the package's own entries, from inner products alone."""

from torch import Tensor

from ebft_mega.block_plan import BlockPlan
from ebft_mega.objective.block_advantages import block_advantages
from ebft_mega.registry.kinds import ADVANTAGE_ESTIMATORS
from ebft_mega.reward.block_inputs import BlockInputs
from ebft_mega.reward.block_rewards import block_rewards
from ebft_mega.reward.terms.alignment import Alignment
from ebft_mega.reward.terms.diversity import Diversity
from ebft_mega.types import BlockRewards, TermValues


def plan_of(num_samples: int, num_blocks: int, generate_length: int = 2) -> BlockPlan:
    """A plan with as many samples and blocks."""
    return BlockPlan(num_blocks + generate_length, 1, 1, generate_length, num_samples)


def rewards_of(
    gram: Tensor, whitening: str, alignment_coef: float, diversity_coef: float, kind: str = "cosine"
) -> BlockRewards:
    """Alignment of this kind and diversity with these coefficients."""
    inputs = BlockInputs.of(gram, whitening, plan_of(gram.shape[-1] - 1, gram.shape[1]))
    return block_rewards(inputs, [(Alignment(kind=kind), alignment_coef), (Diversity(), -diversity_coef)])


def made_rewards(
    alignment: Tensor, diversity: Tensor, cfm: Tensor, alignment_coef: float, diversity_coef: float
) -> BlockRewards:
    """Rewards of given values of the two terms."""
    reward = alignment_coef * alignment - diversity_coef * diversity
    terms = {
        "alignment": TermValues(alignment, alignment_coef, "leave_one_out"),
        "diversity": TermValues(diversity, -diversity_coef, "pairs"),
    }
    return BlockRewards(terms, reward, cfm)


def advantages_of(rewards: BlockRewards, estimator: str) -> Tensor:
    """Advantages by an entry of its name."""
    plan = plan_of(*rewards.reward.shape[1:])
    return block_advantages(ADVANTAGE_ESTIMATORS.entry(estimator)(), rewards, plan)
