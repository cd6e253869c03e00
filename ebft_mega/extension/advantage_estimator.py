"""Contract of an advantage estimator: what log-probabilities of rollouts, or of their tokens, are weighted with."""

from typing import TYPE_CHECKING, ClassVar, Protocol

from ebft_mega.block_plan import BlockPlan
from ebft_mega.extension.entry import Entry
from ebft_mega.extension.reward_term import Need

if TYPE_CHECKING:
    from torch import Tensor

    from ebft_mega.types import BlockRewards


class EstimatorInputs(Protocol):
    """What an estimator may read of a micro-batch. What is not declared in `needs` raises an error when it is read."""

    @property
    def rewards(self) -> "BlockRewards":
        """The terms and their weighted sum, float64 [B, n, K] each; always there."""

    @property
    def plan(self) -> BlockPlan:
        """Positions and lengths of the blocks; always there."""

    @property
    def rollout_tokens(self) -> "Tensor":
        """int64 [B, n, K, G]; needs `tokens`."""

    @property
    def target_tokens(self) -> "Tensor":
        """int64 [B, K, G]; needs `tokens`."""

    @property
    def logprobs(self) -> "Tensor":
        """float32 [B, n, K, G] under the policy that sampled, at the sampling temperature; needs `logprobs`."""


class AdvantageEstimator(Entry):
    """An entry of `ebft.advantage_estimator`.

    A layout may give it any rows of the batch, in any number, but always all n samples of a block: it must treat rows
    and blocks independently of each other. Every rank of a replica computes the same.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()

    def advantages(self, inputs: EstimatorInputs) -> "Tensor":
        """Compute the advantages of a micro-batch; no gradient flows into them.

        Returns:
            float64 [B, n, K], the same for all tokens of a rollout, or [B, n, K, G], one for each token.
        Communication: none.
        """
        raise NotImplementedError
