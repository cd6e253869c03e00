"""Rewards standardised within a block."""

from typing import TYPE_CHECKING

from ebft_mega.extension.advantage_estimator import AdvantageEstimator, EstimatorInputs

if TYPE_CHECKING:
    from torch import Tensor

STANDARD_DEVIATION_EPSILON = 1e-8


class GroupNorm(AdvantageEstimator):
    """(reward - mean) / (standard deviation + 1e-8), both over the n rollouts of a block (axolotl).

    Over the blocks of a sample it would compare continuations of different texts. With one rollout: the reward.

    Follows no objective: what it divides by depends on the rollout itself, so that its mean is not the gradient of any
    function (docs/numerics.md).
    """

    name = "group_norm"

    def advantages(self, inputs: EstimatorInputs) -> "Tensor":
        """Float64 [B, n, K]; exactly 0 for equal rewards of all n >= 3 rollouts of a block."""
        reward = inputs.rewards.reward
        num_samples = reward.shape[1]
        if num_samples == 1:
            return reward
        deviation = reward.std(dim=1, keepdim=True, correction=1)
        # n * (value - mean); exactly 0 for equal rewards, which a mean does not give
        centred = (reward[:, :, None] - reward[:, None, :]).sum(dim=2) / num_samples
        return centred / (deviation + STANDARD_DEVIATION_EPSILON)
