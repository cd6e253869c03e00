"""The reward of a rollout: the sum of its terms, each times its coefficient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ebft_mega.extension.entry_fault import answer_of, require_finite, require_tensor, unchanged
from ebft_mega.extension.reward_term import RewardTerm
from ebft_mega.reward.block_inputs import BlockInputs
from ebft_mega.reward.duplicates import first_equal
from ebft_mega.reward.sampled_blocks import DeclaredInputs
from ebft_mega.types import BlockRewards, TermValues


class TermInputs(DeclaredInputs):
    """What a term is given."""

    def __init__(self, term: RewardTerm, inputs: BlockInputs):
        """Args: as for `block_rewards`."""
        super().__init__(term, inputs.plan, inputs.sampled)
        self.gram, self.products = inputs.gram, inputs.products

    def tensors(self) -> list[Tensor]:
        """Everything that a term may read."""
        products = self.products
        return [*super().tensors(), self.gram, products.rollouts, products.cross, products.target]


def block_rewards(inputs: BlockInputs, terms: Sequence[tuple[RewardTerm, float]]) -> BlockRewards:
    """Terms, reward and CFM of every rollout.

    Equal rollouts get the same figures to the last bit: those with the same inner products, and in terms that declare a
    need those with the same tokens. Everything of a marked block is NaN; other blocks are the same to the last bit.

    Args:
        terms: with their coefficients, at least one.
    Raises:
        EntryFaultError: a term does not hold its contract.
    Communication: none; for a term that is not one of the package's own, the host waits for the device.
    Source: EBFT paper (arXiv 2603.12248), equation 7, for alignment and diversity.
    """
    marked = ~inputs.finite[:, None]  # [B, 1, K]
    found: dict[str, TermValues] = {}
    reward: Tensor | None = None
    for term, coefficient in terms:
        values = _of_first_equal(_term_values(term, inputs), term, inputs)
        reward = coefficient * values if reward is None else reward + coefficient * values
        found[term.name] = TermValues(values.masked_fill(marked, torch.nan), coefficient, term.baseline)
    if reward is None:
        raise ValueError("a reward has at least one term")
    return BlockRewards(found, reward.masked_fill(marked, torch.nan), inputs.cfm)


def _term_values(term: RewardTerm, inputs: BlockInputs) -> Tensor:
    """Values of a term [B, n, K], checked."""
    given = TermInputs(term, inputs)
    with unchanged(term, given.tensors()):
        values = answer_of(term, lambda: term.values(given), "float64 [B, n, K]")
    cross = inputs.products.cross.transpose(1, 2)
    require_tensor(term, values, {"[B, n, K]": tuple(cross.shape)}, cross)
    if not term.is_built_in():
        require_finite(term, values, inputs.finite[:, None])
    return values


def _of_first_equal(values: Tensor, term: RewardTerm, inputs: BlockInputs) -> Tensor:
    """Give equal rollouts of a block the value of the first of them, [B, n, K].

    Rounding of the eigenvectors differs between equal rollouts; their rewards must not. Rollouts of other tokens may
    have equal features (those of zeros), and what a term reads beside features differs between them.
    """
    if term.needs and inputs.sampled is not None:
        first = first_equal(inputs.sampled.rollout_tokens.transpose(1, 2))
    else:
        first = first_equal(inputs.gram[..., :-1, :])
    return values.transpose(1, 2).gather(2, first).transpose(1, 2)
