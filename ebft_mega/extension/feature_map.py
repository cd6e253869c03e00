"""Contract of a feature map: which rows of the frozen network a feature reads, and how they become one vector."""

from typing import TYPE_CHECKING, ClassVar, Literal

from ebft_mega.extension.entry import Entry
from ebft_mega.extension.entry_fault import EntryFaultError, answer_of

if TYPE_CHECKING:
    from torch import Tensor


class FeatureMap(Entry):
    """An entry of `ebft.embed_method`.

    The feature of a rollout, and that of the true continuation, is a vector of each tapped layer. No rank has a whole
    one: `pool` gets a slice of the hidden dimension (tensor parallel) of the layers that lie on its stage (pipeline
    parallel), so it works on tokens alone, the same for every hidden channel and every layer. Normalisation, the
    weights of layers and inner products are the package's (`features/gram.py`).

    Everything but `pool` is asked of a map before a run starts, by the dry run too, which does without torch.
    """

    # Where `ebft.feature_norm` scales to length one: each token before pooling, or the pooled vector.
    normalises: ClassVar[Literal["tokens", "pooled"]] = "pooled"
    # Whether `pool` is the mean of all G rows, scaled before: what tokens add to the feature is known one by one then,
    # and an estimator with a token critic credits each with what it and those after it add.
    is_mean_of_tokens: ClassVar[bool] = False

    def layers(self, fractions: tuple[float, ...]) -> tuple[float, ...]:
        """Choose the depths at which the network is read; by default all that are named.

        Args:
            fractions: `ebft.feature_layers`, ascending: shares of the network's layers, above 0 and at most 1.
        Returns:
            At least one such share, ascending. Nothing above the deepest one is computed.
        """
        return fractions

    def positions(self, generate_length: int) -> range:
        """Choose which of the G positions of a window are read: some of the last ones, ending with G - 1.

        The hidden states of these positions are stored from the feature pass on, in `train.dtype`.
        """
        raise NotImplementedError

    def pool(self, rows: "Tensor") -> "Tensor":
        """Make one vector of the rows of a window, of finite rows a finite one.

        Args:
            rows: float64 [B, K, n + 1, T, H or a slice of it], T positions as `positions` says, the n rollouts of a
                block first, its target last; not to be changed. With `normalises` `tokens` they have been scaled.
        Returns:
            float64 [B, K, n + 1, X], X `vectors` times the last dimension of `rows`, one vector after another, on the
            same device. Windows must not depend on each other: a layout may give any rows of the batch, and equal
            windows must get equal bits.
        Communication: none.
        """
        raise NotImplementedError

    def vectors(self, generate_length: int) -> int:
        """How many vectors of the hidden size `pool` leaves (X / H): the memory plan and the dry run ask for it."""
        return 1


def check_reading(method: FeatureMap, fractions: tuple[float, ...], generate_length: int) -> None:
    """Ask a feature map for everything but `pool`.

    Args:
        fractions: as for `FeatureMap.layers`; generate_length: G.
    Raises:
        EntryFaultError: it raises, or answers what its contract does not allow.
    """
    expected = "layers: a tuple of at least one number > 0 and <= 1, ascending"
    layers = answer_of(method, lambda: method.layers(fractions), expected)
    if not (isinstance(layers, tuple) and layers and all(_is_share(share) for share in layers)):
        raise EntryFaultError(method, f"layers: {layers!r}", expected)
    if list(layers) != sorted(layers):
        raise EntryFaultError(method, f"layers: {layers!r}", expected)
    expected = f"positions: a range of the last positions of {generate_length}, ending with {generate_length - 1}"
    positions = answer_of(method, lambda: method.positions(generate_length), expected)
    if not (isinstance(positions, range) and 0 < len(positions) <= generate_length):
        raise EntryFaultError(method, f"positions: {positions!r}", expected)
    if positions != range(generate_length - len(positions), generate_length):
        raise EntryFaultError(method, f"positions: {positions!r}", expected)
    expected = "vectors: an integer >= 1"
    vectors = answer_of(method, lambda: method.vectors(generate_length), expected)
    if not (isinstance(vectors, int) and not isinstance(vectors, bool) and vectors >= 1):
        raise EntryFaultError(method, f"vectors: {vectors!r}", expected)
    if method.is_mean_of_tokens:
        reads = f"normalises {method.normalises}, {len(positions)} of {generate_length} positions, {vectors} vectors"
        if (method.normalises, len(positions), vectors) != ("tokens", generate_length, 1):
            expected = "is_mean_of_tokens: normalises tokens, all positions, 1 vector; or is_mean_of_tokens False"
            raise EntryFaultError(method, reads, expected)


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
