"""An advantage estimator: leave-one-out baselines, with more weight on the first tokens of a rollout.

What is sampled first decides what can follow, and its advantage is the least noisy: later tokens share the reward with
everything before them. The weights have the mean 1, so that learning rates mean the same.
"""

# In a configuration:
#     plugins: [early_tokens.py]  # a copy beside the configuration
#     ebft: {advantage_estimator: early_tokens}
#     options: {early_tokens: {decay: 0.8}}  # not needed

from typing import TYPE_CHECKING

from ebft_mega.extension.advantage_estimator import AdvantageEstimator, EstimatorInputs
from ebft_mega.extension.options import Section, key

if TYPE_CHECKING:
    from torch import Tensor


class EarlyTokensOptions(Section):
    """How fast the weight falls."""

    decay: float = key(0.9, "Weight of a token relative to that of the token before it.", gt=0, le=1)


class EarlyTokens(AdvantageEstimator):
    """The reward minus the mean of the other rollouts, times a weight that falls from token to token."""

    name = "early_tokens"
    Options = EarlyTokensOptions

    def advantages(self, inputs: EstimatorInputs) -> "Tensor":
        """One advantage for each token, float64 [B, n, K, G]."""
        import torch

        reward = inputs.rewards.reward
        num_samples, length = reward.shape[1], inputs.plan.generate_length
        others = (reward.sum(dim=1, keepdim=True) - reward) / max(1, num_samples - 1)  # 0 where there are none
        steps = torch.arange(length, dtype=torch.float64, device=reward.device)
        weights = self.options.decay**steps
        return (reward - others)[..., None] * (weights / weights.mean())
