"""Advantages of rollouts among the samples of their own anchor."""

from typing import Literal

import torch
from torch import Tensor

from ebft_mega.types import BlockRewards

Estimator = Literal["rloo", "group_norm", "reinforce"]
GROUP_NORM_EPSILON = 1e-8


def block_advantages(
    rewards: BlockRewards, estimator: Estimator, alignment_coef: float, diversity_coef: float
) -> Tensor:
    """One advantage per rollout, shared by its G tokens.

    Args:
        estimator: `rloo` subtracts leave-one-out baselines; `group_norm` standardises over the samples of an anchor
            (not over blocks, as the authors' code does: blocks are different problems); `reinforce` takes the reward.
    Returns:
        float64 [B, n, K]; no gradient flows through it. With n = 1 every estimator gives the reward.
    Communication: none; all samples of an anchor live on one rank.
    Source: EBFT paper (arXiv 2603.12248) and the authors' code.
    """
    reward = rewards.reward
    num_samples = reward.shape[1]
    if estimator == "reinforce" or num_samples == 1:
        return reward
    if estimator == "group_norm":
        spread = reward.std(dim=1, keepdim=True) + GROUP_NORM_EPSILON
        return (reward - reward.mean(dim=1, keepdim=True)) / spread
    return _leave_one_out(rewards, alignment_coef, diversity_coef)


def _leave_one_out(rewards: BlockRewards, alignment_coef: float, diversity_coef: float) -> Tensor:
    """Baselines that do not depend on the own sample, so the gradient stays unbiased.

    Alignment: the mean of the others. Diversity: twice the mean similarity among the others, which is
    (Σ_k div_k - 2 div_j) / (n - 2), since every div_k contains k's similarity to j once; none for n = 2. Written as
    differences, so that a group of equal rewards gives exactly zero.
    """
    num_samples = rewards.alignment.shape[1]

    def against_others(term: Tensor, others: int) -> Tensor:
        # (term_j - mean) n / others without rounding when all terms are equal.
        return (term[:, :, None] - term[:, None, :]).sum(dim=2) / others

    advantage = alignment_coef * against_others(rewards.alignment, num_samples - 1)
    if num_samples > 2:
        return advantage - diversity_coef * against_others(rewards.diversity, num_samples - 2)
    return advantage - diversity_coef * rewards.diversity
