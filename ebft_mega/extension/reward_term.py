"""Contract of a reward term: one summand of the reward of a rollout."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from ebft_mega.block_plan import BlockPlan
from ebft_mega.extension.entry import Entry

if TYPE_CHECKING:
    from torch import Tensor

# What costs something to supply, so that an entry declares it: token ids, the policy's log-probabilities (a forward
# pass of the policy more), decoded texts.
Need = Literal["tokens", "logprobs", "texts"]
# The baseline that `rloo` subtracts, which must not depend on the rollout itself. `leave_one_out`: a value is a
# function of its rollout alone, and the mean of the others is its baseline. `pairs`: a value is twice the mean of a
# symmetric function of its rollout and each other one, and the baseline leaves the rollout's pairs out. `none`: there
# is none.
Baseline = Literal["leave_one_out", "pairs", "none"]


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


class RewardInputs(Protocol):
    """What a term may read of a micro-batch. What is not declared in `needs` raises an error when it is read.

    In a block in which something was not finite (`reward/marked_blocks.py`) the products are those of stand-ins, and
    whatever a term returns for it becomes NaN.
    """

    @property
    def plan(self) -> BlockPlan:
        """Positions and lengths of the blocks; always there."""

    @property
    def gram(self) -> "Tensor":
        """Inner products of features, float64 [B, K, n + 1, n + 1], samples first, the target last; always there."""

    @property
    def products(self) -> WhitenedProducts:
        """The same after whitening; always there, computed once."""

    @property
    def rollout_tokens(self) -> "Tensor":
        """int64 [B, n, K, G]; needs `tokens`."""

    @property
    def target_tokens(self) -> "Tensor":
        """int64 [B, K, G]; needs `tokens`."""

    @property
    def logprobs(self) -> "Tensor":
        """float32 [B, n, K, G] under the policy that sampled, at the sampling temperature; needs `logprobs`."""

    @property
    def rollout_texts(self) -> Sequence[Sequence[Sequence[str]]]:
        """The rollouts decoded, by row, sample and block; needs `texts`."""

    @property
    def target_texts(self) -> Sequence[Sequence[str]]:
        """The true continuations decoded, by row and block; needs `texts`."""


class RewardTerm(Entry):
    """A summand of the reward: an entry of `ebft.reward_terms`, which gives its coefficient.

    A layout may give it any rows of the batch, in any number, but always all n samples of a block: it must treat rows
    and blocks independently of each other. Every rank of a replica computes the same, so the values must not depend on
    anything random. They are finite.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    baseline: ClassVar[Baseline] = "leave_one_out"

    def values(self, inputs: RewardInputs) -> "Tensor":
        """Compute the term of every rollout of a micro-batch, without its coefficient.

        Returns:
            float64 [B, n, K], finite. Equal rollouts of a block must get the same bits.
        Communication: none.
        """
        raise NotImplementedError
