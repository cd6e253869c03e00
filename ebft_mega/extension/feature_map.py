"""Contract of a feature map: which rows of the frozen network a feature reads, and how they become one vector."""

from typing import TYPE_CHECKING, ClassVar, Literal

from ebft_mega.extension.entry import Entry

if TYPE_CHECKING:
    from torch import Tensor


class FeatureMap(Entry):
    """An entry of `ebft.embed_method`.

    The feature of a rollout, and that of the true continuation, is a vector of each tapped layer. No rank has a whole
    one: `pool` gets a slice of the hidden dimension (tensor parallel) of the layers that lie on its stage (pipeline
    parallel), so it works on tokens alone, the same for every hidden channel and every layer. Normalisation, the
    weights of layers and inner products are the package's (`features/gram.py`).
    """

    # Where `ebft.feature_norm` scales to length one: each token before pooling, or the pooled vector.
    normalises: ClassVar[Literal["tokens", "pooled"]] = "pooled"

    def layers(self, fractions: tuple[float, ...]) -> tuple[float, ...]:
        """Depths at which the network is read, ascending, of those that `ebft.feature_layers` names; all by default."""
        return fractions

    def positions(self, generate_length: int) -> range:
        """Which of the G positions of a window are read, first to last; they end with the last one, G - 1."""
        raise NotImplementedError

    def pool(self, rows: "Tensor") -> "Tensor":
        """Make one vector of the rows of a window.

        Args:
            rows: float64 [B, K, n + 1, T, H or a slice of it], T positions as `positions` says.
        Returns:
            float64 [B, K, n + 1, X], X a multiple of the last dimension.
        Communication: none.
        """
        raise NotImplementedError

    def vectors(self, generate_length: int) -> int:
        """How many vectors of the hidden size `pool` leaves (X / H): planning counts memory and arithmetic with it."""
        return 1
