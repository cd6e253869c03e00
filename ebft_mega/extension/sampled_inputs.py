"""What reward terms and advantage estimators alike may read of a micro-batch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from ebft_mega.block_plan import BlockPlan

if TYPE_CHECKING:
    from torch import Tensor

# What costs something to supply, so that an entry declares it. `tokens`: nothing but the declaration. `logprobs`: the
# sampling notes them anyway where `learn.reuse_rollout` saves its forward pass, and one normaliser for each sampled
# token more where it is `off`; no pass of the policy more; stages of a pipeline exchange 4 bytes for each token.
# `texts`: tokens are copied to the host, which waits for the device, and decoded there.
TermNeed = Literal["tokens", "logprobs", "texts"]
# An estimator may also declare `critic`: the token critic is fitted and used (docs/tuning.md says what it costs).
Need = Literal[TermNeed, "critic"]


class SampledInputs(Protocol):
    """The blocks of a micro-batch, their rollouts and their targets.

    What is not declared in an entry's `needs` raises an error when it is read. Tensors are on the device of the run and
    are shared: an entry must not change them.
    """

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
        """float32 [B, n, K, G] under the weights that sampled, at the sampling temperature; needs `logprobs`.

        Of the whole distribution, also where `ebft.top_p` cuts it.
        """

    @property
    def rollout_texts(self) -> Sequence[Sequence[Sequence[str]]]:
        """The rollouts decoded, by row, sample and block; needs `texts`."""

    @property
    def target_texts(self) -> Sequence[Sequence[str]]:
        """The true continuations decoded, by row and block; needs `texts`."""
