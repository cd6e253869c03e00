"""The feature of the last token."""

from typing import TYPE_CHECKING

from ebft_mega.extension.feature_map import FeatureMap

if TYPE_CHECKING:
    from torch import Tensor


class LastToken(FeatureMap):
    """The last of the G positions alone (the authors' default)."""

    name = "last_token"
    normalises = "pooled"

    def positions(self, generate_length: int) -> range:
        """Position G - 1."""
        return range(generate_length - 1, generate_length)

    def pool(self, rows: "Tensor") -> "Tensor":
        """The only row, [B, K, n + 1, H or a slice]."""
        return rows[..., 0, :]
