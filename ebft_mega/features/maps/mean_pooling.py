"""The mean of the tokens' features."""

from typing import TYPE_CHECKING

from ebft_mega.extension.feature_map import FeatureMap

if TYPE_CHECKING:
    from torch import Tensor


class MeanPooling(FeatureMap):
    """The mean of the G tokens' normalised features; the mean itself is not normalised (the authors' option)."""

    name = "mean_pooling"
    normalises = "tokens"
    is_mean_of_tokens = True

    def positions(self, generate_length: int) -> range:
        """All G."""
        return range(generate_length)

    def pool(self, rows: "Tensor") -> "Tensor":
        """Mean over the tokens, [B, K, n + 1, H or a slice]."""
        return rows.mean(dim=-2)
