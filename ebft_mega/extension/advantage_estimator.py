"""Contract of an advantage estimator: what log-probabilities of rollouts, or of their tokens, are weighted with."""

from typing import TYPE_CHECKING, ClassVar, Protocol

from ebft_mega.extension.critic_settings import CriticSettings
from ebft_mega.extension.entry import Entry
from ebft_mega.extension.sampled_inputs import Need, SampledInputs

if TYPE_CHECKING:
    from torch import Tensor

    from ebft_mega.types import BlockRewards, CriticValues


class EstimatorInputs(SampledInputs, Protocol):
    """What an estimator may read of a micro-batch; see `SampledInputs` for the rest."""

    @property
    def rewards(self) -> "BlockRewards":
        """The terms and their weighted sum, float64 [B, n, K] each; always there. NaN in a block that is not finite."""

    @property
    def critic(self) -> "CriticValues | None":
        """What the token critic makes of alignment and diversity; needs `critic`. None: it is not fitted yet."""


class AdvantageEstimator(Entry):
    """An entry of `ebft.advantage_estimator`.

    A layout may give it any rows of the batch, in any number, but always all n samples of a block: it must treat rows
    and blocks independently of each other. Every rank of a replica computes the same, so the advantages must not
    depend on anything random. What does not hold this contract ends the run on all ranks, with the place of the entry.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    # Whether the mean gradient is that of the rewards themselves: nothing that is subtracted or multiplied with depends
    # on the rollout, where features are not whitened. It is said in words only (`config/objective_text.py`).
    leaves_the_mean: ClassVar[bool] = False

    def critic_settings(self) -> CriticSettings:
        """How the token critic is fitted and used, for an estimator that needs `critic`.

        Its advantages contain `critic.advantages`: the loss adds the expectation that belongs to those.
        """
        return CriticSettings()

    def advantages(self, inputs: EstimatorInputs) -> "Tensor":
        """Compute the advantages of a micro-batch; no gradient flows into them.

        Returns:
            float64 [B, n, K], the same for all tokens of a rollout, or [B, n, K, G], one for each token; on the device
            of the rewards, finite where those are.
        Communication: none.
        """
        raise NotImplementedError
