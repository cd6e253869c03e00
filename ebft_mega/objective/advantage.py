"""Advantages from rewards, with a baseline over the n rollouts of one block."""

from typing import Literal

from torch import Tensor

from ebft_mega.types import BlockRewards

AdvantageEstimator = Literal["rloo", "group_norm", "reinforce"]

STANDARD_DEVIATION_EPSILON = 1e-8


def block_advantages(
    rewards: BlockRewards, estimator: AdvantageEstimator, alignment_coef: float, diversity_coef: float
) -> Tensor:
    """Advantage of every rollout; all G tokens of a rollout share it.

    `rloo` subtracts what a rollout's reward would be expected to be without it. For the alignment that is the
    mean of the others. A rollout's diversity is the mean similarity to the others, so the others' own
    diversity contains their similarity to this rollout; the baseline leaves those pairs out, or it would
    depend on what it is the baseline of (and shrink the diversity's advantage to (n - 2) / (n - 1)).
    `group_norm` is (reward - mean) / (standard deviation + 1e-8), both over the samples of a block. Over the
    blocks of a sample it would compare continuations of different texts.
    `reinforce` is the reward itself.

    With one sample there is nothing to compare with and the advantage is the reward; with two, no pair is
    left to make a diversity baseline of, and that term has none.

    Args:
        rewards: fields float64 [B, n, K].
        alignment_coef, diversity_coef: weights of the terms, as in `rewards.reward`.
    Returns:
        float64 [B, n, K]. Equal rewards of all n >= 3 samples of a block give exactly 0 (`rloo`,
        `group_norm`).
    Raises:
        ValueError: for an unknown estimator.
    Communication: none.
    Source: EBFT paper (arXiv 2603.12248), equation 94 and the authors' `compute_baseline` for `rloo`; axolotl
    for `group_norm`.
    """
    num_samples = rewards.reward.shape[1]
    if estimator not in ("rloo", "group_norm", "reinforce"):
        raise ValueError(f"advantage_estimator must be rloo, group_norm or reinforce, not {estimator!r}")
    if estimator == "reinforce" or num_samples == 1:
        return rewards.reward
    if estimator == "group_norm":
        deviation = rewards.reward.std(dim=1, keepdim=True, correction=1)
        centred = _sum_of_differences(rewards.reward) / num_samples
        return centred / (deviation + STANDARD_DEVIATION_EPSILON)
    alignment = _sum_of_differences(rewards.alignment) / (num_samples - 1)
    if num_samples == 2:
        diversity = rewards.diversity
    else:
        # d_j - (sum_k d_k - 2 d_j) / (n - 2): the baseline is twice the mean similarity among the others.
        diversity = _sum_of_differences(rewards.diversity) / (num_samples - 2)
    return alignment_coef * alignment - diversity_coef * diversity


def _sum_of_differences(values: Tensor) -> Tensor:
    """n * (value - mean over samples), [B, n, K]; exactly 0 for equal samples, which a mean does not give."""
    return (values[:, :, None] - values[:, None, :]).sum(dim=2)
