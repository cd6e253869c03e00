"""The alignment term."""

from typing import TYPE_CHECKING

from ebft_mega.extension.reward_term import RewardInputs, RewardTerm

if TYPE_CHECKING:
    from torch import Tensor


class Alignment(RewardTerm):
    """Twice the cosine of a rollout's feature and the true continuation's, after whitening (EBFT paper, equation 7)."""

    name = "alignment"

    def values(self, inputs: RewardInputs) -> "Tensor":
        """2 cos(x_j, y_j), float64 [B, n, K]; 0 for zero features."""
        return (2 * inputs.products.cosine).transpose(-1, -2)
