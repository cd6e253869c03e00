"""The normalised mean of the tokens' hidden states."""

from typing import TYPE_CHECKING

from ebft_mega.extension.feature_map import FeatureMap

if TYPE_CHECKING:
    from torch import Tensor


class CompletionMean(FeatureMap):
    """The mean of the G tokens' hidden states as they are, normalised afterwards (axolotl's structured mode).

    Tokens with large hidden states weigh more in it than in `mean_pooling`, and its length is one.

    Source: axolotl's `embed_method: completion_mean`, the mean over the tokens of the completion, of which G are read
    here for each block.
    """

    name = "completion_mean"
    normalises = "pooled"

    def positions(self, generate_length: int) -> range:
        """All G."""
        return range(generate_length)

    def pool(self, rows: "Tensor") -> "Tensor":
        """Mean over the tokens, [B, K, n + 1, H or a slice]."""
        return rows.mean(dim=-2)
