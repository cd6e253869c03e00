"""What a token critic belongs to: recorded in checkpoints, and compared when a run resumes. No torch."""

import math

from ebft_mega.architecture.hf_config import Architecture, tapped_layers
from ebft_mega.config.entries import advantage_estimator, feature_map, tapped_fractions, uses_critic
from ebft_mega.config.schema import RunConfig
from ebft_mega.io.records import Count, Record

CRITIC_STATE = "critic"  # kind of state and folder of its tensors in a checkpoint
CRITIC_STATE_BYTES = 8  # of a number there: float64
TABLE, SQUARES = "table", "squares"


class CriticRecord(Record):
    """Which features a token critic predicts, by which vectors of tokens, and how much it has seen."""

    feature_map: str  # `ebft.embed_method`
    feature_norm: str
    layers: tuple[Count, ...]  # depths at which the frozen network is read, in blocks from the input
    layer_weights: tuple[float, ...] | None
    vectors: Count  # of the hidden size, of each layer
    hidden_size: Count
    generate_length: Count  # G
    rank: Count  # r, numbers of a token's vector
    vocabulary: Count  # V
    batches: Count  # that it has learned from

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The whole tensors of its state by name: token vectors, and sums of products of 4 r + 1 regressors."""
        length, size = self.generate_length, 4 * self.rank + 1
        shapes = {TABLE: (self.vocabulary, self.rank), SQUARES: (length, size, size)}
        products = (length, size, self.vectors, self.hidden_size)
        return shapes | {products_name(index): products for index in range(len(self.layers))}

    @property
    def num_bytes(self) -> int:
        """Size of its state in a checkpoint."""
        return CRITIC_STATE_BYTES * sum(map(math.prod, self.shapes.values()))


def products_name(index: int) -> str:
    """Name of the sums of regressors times features of one layer.

    Args:
        index: of the layer in `CriticRecord.layers`.
    """
    return f"products.{index}"


def critic_record(
    config: RunConfig, architecture: Architecture, feature_architecture: Architecture, batches: int = 0
) -> CriticRecord | None:
    """Describe the critic of a run; None for a run without one.

    Args:
        architecture, feature_architecture: of the policy and of the frozen network.
        batches: that it has learned from.
    """
    if not uses_critic(config):
        return None
    ebft = config.ebft
    return CriticRecord(
        feature_map=ebft.embed_method,
        feature_norm=ebft.feature_norm,
        layers=tapped_layers(tapped_fractions(config), feature_architecture.num_hidden_layers),
        layer_weights=ebft.layer_weights,
        vectors=feature_map(config).vectors(ebft.generate_max_len),
        hidden_size=feature_architecture.hidden_size,
        generate_length=ebft.generate_max_len,
        rank=min(advantage_estimator(config).critic_settings().rank, architecture.hidden_size),
        vocabulary=architecture.vocab_size,
        batches=batches,
    )
