"""The alignment term."""

from typing import TYPE_CHECKING, Literal

from ebft_mega.extension.options import Section
from ebft_mega.extension.reward_term import RewardInputs, RewardTerm

if TYPE_CHECKING:
    from torch import Tensor

AlignmentKind = Literal["cosine", "inner_product"]


class Alignment(RewardTerm):
    """Twice the cosine of a rollout's feature and the true continuation's, after whitening (EBFT paper, equation 7).

    With `ebft.alignment: inner_product` it is twice their inner product. The two are one for features of length 1. Of
    others a cosine forgets the length that diversity keeps, and their sum is another objective than feature matching
    (docs/numerics.md).
    """

    name = "alignment"

    def __init__(self, options: Section | None = None, kind: AlignmentKind = "cosine") -> None:
        """Args: kind: `ebft.alignment`."""
        super().__init__(options)
        self.kind = kind

    def values(self, inputs: RewardInputs) -> "Tensor":
        """2 cos(x_j, y_j), 0 for zero features, or 2 x_j . y_j; float64 [B, n, K]."""
        products = inputs.products
        similarity = products.cosine if self.kind == "cosine" else products.cross
        return (2 * similarity).transpose(-1, -2)
