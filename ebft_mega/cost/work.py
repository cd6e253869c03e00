"""Count FLOPs of a layer, a phase and a step from its rows and query-key pairs."""

from collections.abc import Sequence
from dataclasses import dataclass

from ebft_mega.architecture.hf_config import Architecture


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of matrix products, two per multiply-add; nothing else is counted."""

    linear: int = 0  # the layers' projections and MLPs
    head: int = 0  # the language-model head
    attention: int = 0  # scores and weighted values
    critic: int = 0  # the token critic, in float64 and in the head's dtype

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(
            self.linear + other.linear,
            self.head + other.head,
            self.attention + other.attention,
            self.critic + other.critic,
        )

    def times(self, factor: int) -> "Flops":
        """The same work done `factor` times."""
        return Flops(self.linear * factor, self.head * factor, self.attention * factor, self.critic * factor)

    @property
    def of_models(self) -> int:
        """Those of the policy and of the feature network."""
        return self.linear + self.head + self.attention

    @property
    def total(self) -> int:
        """Sum of all four."""
        return self.of_models + self.critic


@dataclass(frozen=True)
class LayerWork:
    """The forward work of one layer for one row of the batch."""

    keys: int  # positions whose key and value are projected
    queries: int  # positions whose query is projected; fused projections make them equal to `keys`
    outputs: int  # positions that go through the output projection and the MLP
    pairs: int  # query-key pairs of each head

    @classmethod
    def whole(cls, rows: int, pairs: int) -> "LayerWork":
        """Work of a layer whose outputs are needed at all positions."""
        return cls(rows, rows, rows, pairs)

    def flops(self, architecture: Architecture) -> Flops:
        """Forward operations of the layer.

        Linear: 2 * H * (heads * d) per query, 2 * H * (2 * key-value heads * d) per key, and 2 * H * (heads * d) for
        the output projection and 2 * 3 * H * I for the gated MLP per output. Attention: 4 * heads * d per pair.
        """
        a = architecture
        query, key_value = a.query_width, 2 * a.key_value_width
        weights = self.queries * query + self.keys * key_value + self.outputs * (query + 3 * a.intermediate_size)
        return Flops(linear=2 * a.hidden_size * weights, attention=4 * query * self.pairs)


@dataclass(frozen=True)
class PhaseCost:
    """The work of one phase of a step for one row of the batch, or for several if added up."""

    rows: int = 0  # positions that go through layers; of rollouts their distinct beginnings
    layers: int = 0  # layers that they go through
    head_rows: int = 0
    pairs: int = 0  # query-key pairs of each head in a whole layer
    flops: Flops = Flops()
    recomputed: Flops = Flops()  # forward work that is done a second time, not part of `flops`

    def __add__(self, other: "PhaseCost") -> "PhaseCost":
        """Of the rows of both, which go through the same layers."""
        return PhaseCost(
            self.rows + other.rows,
            max(self.layers, other.layers),
            self.head_rows + other.head_rows,
            self.pairs + other.pairs,
            self.flops + other.flops,
            self.recomputed + other.recomputed,
        )

    @property
    def total(self) -> int:
        """All floating-point operations of the phase, recomputation included."""
        return self.flops.total + self.recomputed.total


@dataclass(frozen=True)
class StepCost:
    """The work of all phases of a step for one row of the batch, or for several if added up."""

    generate: PhaseCost
    features: PhaseCost
    policy_forward: PhaseCost
    policy_backward: PhaseCost
    update: PhaseCost = PhaseCost()  # no matrix products but those of the token critic

    def __add__(self, other: "StepCost") -> "StepCost":
        """Of the rows of both."""
        pairs = zip(self.phases.values(), other.phases.values(), strict=True)
        return StepCost(*(own + others for own, others in pairs))

    @property
    def phases(self) -> dict[str, PhaseCost]:
        """Phases by name, in the order in which a step runs them."""
        return {
            "generate": self.generate,
            "features": self.features,
            "policy_forward": self.policy_forward,
            "policy_backward": self.policy_backward,
            "update": self.update,
        }

    @property
    def total(self) -> int:
        """All floating-point operations, recomputation included."""
        return sum(phase.total for phase in self.phases.values())

    @property
    def critic(self) -> int:
        """Those of the token critic among them."""
        return sum(phase.flops.critic + phase.recomputed.critic for phase in self.phases.values())


def forward_flops(architecture: Architecture, layers: Sequence[LayerWork], head_rows: int) -> Flops:
    """Sum the forward operations of layers and of the head, 2 * H * V per head row."""
    total = Flops(head=2 * architecture.hidden_size * architecture.vocab_size * head_rows)
    for layer in layers:
        total += layer.flops(architecture)
    return total


def causal_pairs(length: int) -> int:
    """Query-key pairs of causal attention within a document."""
    return length * (length + 1) // 2
