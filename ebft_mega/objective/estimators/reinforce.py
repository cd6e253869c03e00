"""The reward itself."""

from typing import TYPE_CHECKING

from ebft_mega.extension.advantage_estimator import AdvantageEstimator, EstimatorInputs

if TYPE_CHECKING:
    from torch import Tensor


class Reinforce(AdvantageEstimator):
    """The reward itself, without a baseline.

    Follows delta |E phi|^2 - alpha E a as `rloo` does (there the legend is), with more noise.
    """

    name = "reinforce"
    leaves_the_mean = True

    def advantages(self, inputs: EstimatorInputs) -> "Tensor":
        """The rewards, float64 [B, n, K]."""
        return inputs.rewards.reward
