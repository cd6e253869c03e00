"""The diversity term."""

from typing import TYPE_CHECKING

from ebft_mega.extension.reward_term import RewardInputs, RewardTerm

if TYPE_CHECKING:
    from torch import Tensor


class Diversity(RewardTerm):
    """Twice the mean inner product of a rollout's feature with those of its block's others (EBFT paper, equation 7).

    A penalty: `ebft.diversity_coef` enters the reward with a minus sign.
    """

    name = "diversity"
    baseline = "pairs"

    def values(self, inputs: RewardInputs) -> "Tensor":
        """2 / (n - 1) * sum over k != j of x_j . x_k, a plain inner product, float64 [B, n, K]; 0 for n = 1."""
        products = inputs.products
        lengths = products.rollouts.diagonal(dim1=-2, dim2=-1)
        num_samples = lengths.shape[-1]
        if num_samples == 1:
            return lengths.new_zeros(lengths.shape).transpose(-1, -2)
        return (2 * (products.rollouts.sum(dim=-1) - lengths) / (num_samples - 1)).transpose(-1, -2)
