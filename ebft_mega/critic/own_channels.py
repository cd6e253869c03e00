"""Which channels of a feature a rank has."""

from dataclasses import dataclass

from ebft_mega.features.network import FeatureNetwork


@dataclass(frozen=True)
class OwnChannels:
    """A rank's slice of its tapped layers: D' channels, layer by layer, of each its vectors one after another."""

    layers: tuple[int, ...]  # places of this stage's layers in the list of all tapped ones
    vectors: int  # of the hidden size, of each layer
    hidden: slice  # this tensor-parallel rank's part of the hidden dimension
    hidden_size: int

    @classmethod
    def of(cls, features: FeatureNetwork) -> "OwnChannels":
        """Those of this rank. Communication: none."""
        stage = features.stage
        own = stage.shape.taps_within(features.taps)
        layers = tuple(index for index, tap in enumerate(features.taps) if tap in own)  # one depth may be there twice
        hidden_size = stage.architecture.hidden_size
        width = hidden_size // stage.groups.tensor_parallel_size
        start = width * stage.groups.tensor_parallel_rank
        vectors = features.recipe.map.vectors(features.recipe.generate_length)
        return cls(layers, vectors, slice(start, start + width), hidden_size)

    @property
    def width(self) -> int:
        """Channels of one vector."""
        return int(self.hidden.stop - self.hidden.start)

    @property
    def count(self) -> int:
        """D'."""
        return len(self.layers) * self.vectors * self.width
