"""Contract of a reward term: one summand of the reward of a rollout."""

from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from ebft_mega.extension.entry import Entry
from ebft_mega.extension.sampled_inputs import SampledInputs, TermNeed

if TYPE_CHECKING:
    from torch import Tensor

# The baseline that `rloo` subtracts, which must not depend on the rollout itself. `leave_one_out`: a value is a
# function of its rollout alone, and the mean of the others is its baseline. `pairs`: a value is twice the mean of a
# symmetric function of its rollout and each other one, and the baseline leaves the rollout's pairs out. `none`: there
# is none.
Baseline = Literal["leave_one_out", "pairs", "none"]
# What else a step's metrics (`ebft/NAME`) and its trace are called: a term has another name.
RESERVED_NAMES = (
    *("rl_loss", "ce_loss", "mean_reward", "cfm_loss", "advantages_std", "duplicate_share"),
    *("gradient_signal_to_noise", "critical_batch_rows"),
    *("tokens", "kept", "rollouts", "gram", "reward", "advantage", "logprobs", "target_logprobs"),
    *("critic_value", "critic_direction", "token_table", "prefix_weights", "token_weights"),
)


class WhitenedProducts(Protocol):
    """Inner products after whitening, of the rollouts x_j and each one's own copy y_j of the target."""

    @property
    def rollouts(self) -> "Tensor":
        """x_j . x_k, float64 [B, K, n, n]."""

    @property
    def cross(self) -> "Tensor":
        """x_j . y_j, float64 [B, K, n]."""

    @property
    def target(self) -> "Tensor":
        """y_j . y_j, float64 [B, K, n]."""

    @property
    def cosine(self) -> "Tensor":
        """Cosine of x_j and y_j, float64 [B, K, n]; 0 where one of them is 0."""


class RewardInputs(SampledInputs, Protocol):
    """What a term may read of a micro-batch; see `SampledInputs` for the rest.

    In a block in which something was not finite (`reward/marked_blocks.py`) inner products are those of stand-ins, and
    whatever a term returns for it becomes NaN.
    """

    @property
    def gram(self) -> "Tensor":
        """Inner products of features, float64 [B, K, n + 1, n + 1], samples first, the target last; always there."""

    @property
    def products(self) -> WhitenedProducts:
        """The same after whitening; always there, computed once."""


class RewardTerm(Entry):
    """A summand of the reward: an entry of `ebft.reward_terms`, which gives its coefficient.

    A layout may give it any rows of the batch, in any number, but always all n samples of a block: it must treat rows
    and blocks independently of each other. Every rank of a replica computes the same, so the values must not depend on
    anything random. What does not hold this contract ends the run on all ranks, with the place of the entry.
    """

    needs: ClassVar[frozenset[TermNeed]] = frozenset()
    baseline: ClassVar[Baseline] = "leave_one_out"

    def values(self, inputs: RewardInputs) -> "Tensor":
        """Compute the term of every rollout of a micro-batch, without its coefficient.

        Returns:
            float64 [B, n, K] on the inputs' device, finite. Equal rollouts of a block (of equal features, or for a term
            that declares a need of equal tokens) are given the value of the first of them.
        Communication: none.
        """
        raise NotImplementedError
