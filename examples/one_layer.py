"""A feature map: the last token's hidden state in the deepest of the tapped layers alone."""

# In a configuration:
#     plugins: [one_layer.py]  # a copy beside the configuration
#     ebft: {embed_method: one_layer}

from typing import TYPE_CHECKING

from ebft_mega.extension.feature_map import FeatureMap

if TYPE_CHECKING:
    from torch import Tensor


class OneLayer(FeatureMap):
    """The last of the G positions, in the deepest layer of `ebft.feature_layers` alone."""

    name = "one_layer"
    normalises = "pooled"

    def layers(self, fractions: tuple[float, ...]) -> tuple[float, ...]:
        """The deepest one."""
        return fractions[-1:]

    def positions(self, generate_length: int) -> range:
        """Position G - 1."""
        return range(generate_length - 1, generate_length)

    def pool(self, rows: "Tensor") -> "Tensor":
        """The only row, [B, K, n + 1, H or a slice]."""
        return rows[..., 0, :]
