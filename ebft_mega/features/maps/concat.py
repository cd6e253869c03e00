"""All tokens' features, one after another."""

from typing import TYPE_CHECKING

from ebft_mega.extension.feature_map import FeatureMap

if TYPE_CHECKING:
    from torch import Tensor


class Concat(FeatureMap):
    """All G tokens' normalised features, concatenated; the whole is not normalised (the authors' option).

    Two features are compared position by position: their inner product is the sum of those of the G tokens, and the
    squared length is G (with `per_layer` G times the number of layers).

    Source: the authors' `embed_method: concat`, whose hidden states are scaled to length one per token before the G of
    a block are reshaped into one vector. It is not axolotl's `concat`, which reads quartiles of a whole text.
    """

    name = "concat"
    normalises = "tokens"

    def positions(self, generate_length: int) -> range:
        """All G."""
        return range(generate_length)

    def pool(self, rows: "Tensor") -> "Tensor":
        """The tokens' vectors in their order, [B, K, n + 1, T * (H or a slice)]."""
        return rows.flatten(-2)

    def vectors(self, generate_length: int) -> int:
        """One for each token."""
        return generate_length
