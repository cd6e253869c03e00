"""Advantages of rollouts, or of their tokens, by an entry of `ebft.advantage_estimator`."""

from torch import Tensor

from ebft_mega.block_plan import BlockPlan
from ebft_mega.extension.advantage_estimator import AdvantageEstimator
from ebft_mega.extension.entry_fault import answer_of, require_finite, require_tensor, unchanged
from ebft_mega.reward.sampled_blocks import DeclaredInputs, SampledBlocks
from ebft_mega.types import BlockRewards


class RewardedInputs(DeclaredInputs):
    """What an estimator is given."""

    def __init__(
        self, estimator: AdvantageEstimator, plan: BlockPlan, sampled: SampledBlocks | None, rewards: BlockRewards
    ):
        """Args: as for `block_advantages`."""
        super().__init__(estimator, plan, sampled)
        self.rewards = rewards

    def tensors(self) -> list[Tensor]:
        """Everything that an estimator may read."""
        rewards = self.rewards
        return [*super().tensors(), rewards.reward, rewards.cfm, *(term.values for term in rewards.terms.values())]


def block_advantages(
    estimator: AdvantageEstimator, rewards: BlockRewards, plan: BlockPlan, sampled: SampledBlocks | None = None
) -> Tensor:
    """Advantages of a micro-batch.

    Args:
        sampled: tokens and what else an estimator may declare; None: it is given rewards alone.
    Returns:
        float64 [B, n, K], or [B, n, K, G] one for each token.
    Raises:
        EntryFaultError: the estimator does not hold its contract.
    Communication: none; unless the estimator is one of the package's own, the host waits for the device.
    """
    inputs = RewardedInputs(estimator, plan, sampled, rewards)
    expected = "float64 [B, n, K] or [B, n, K, G]"
    with unchanged(estimator, inputs.tensors()):
        advantages = answer_of(estimator, lambda: estimator.advantages(inputs), expected)
    shape = tuple(rewards.reward.shape)
    shapes = {"[B, n, K]": shape, "[B, n, K, G]": (*shape, plan.generate_length)}
    require_tensor(estimator, advantages, shapes, rewards.reward)
    if not estimator.is_built_in():
        require_finite(estimator, advantages, rewards.reward.isfinite())
    return advantages
