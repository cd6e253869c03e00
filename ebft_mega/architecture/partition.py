"""A model's layers cut into pipeline stages, a rank's parameters, and the tensor-parallel sizes that fit. No torch."""

from dataclasses import dataclass

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.vocabulary_blocks import NUM_VOCABULARY_BLOCKS, padded_vocabulary


def split_layers(num_layers: int, num_stages: int) -> tuple[range, ...]:
    """Consecutive layers of every stage, as even as possible; the earlier stages take the remainder.

    The last stage has the head, so it is never among the longer ones.
    """
    short, longer = divmod(num_layers, num_stages)
    starts = [stage * short + min(stage, longer) for stage in range(num_stages + 1)]
    return tuple(range(first, end) for first, end in zip(starts, starts[1:], strict=False))


@dataclass(frozen=True)
class StageShape:
    """Which part of a model a pipeline stage holds."""

    first_layer: int  # index of its first layer in the model
    num_layers: int
    has_embedding: bool
    has_final_norm: bool
    has_head: bool

    @classmethod
    def whole(cls, architecture: Architecture) -> "StageShape":
        """The whole model in one stage."""
        return cls.of_policy(architecture, 0, 1)

    @classmethod
    def of_policy(cls, architecture: Architecture, stage: int, num_stages: int) -> "StageShape":
        """A stage of a language model: the first has the embedding, the last the final norm and the head."""
        layers = split_layers(architecture.num_hidden_layers, num_stages)[stage]
        is_last = stage == num_stages - 1
        return cls(layers.start, len(layers), stage == 0, has_final_norm=is_last, has_head=is_last)

    @classmethod
    def of_features(cls, architecture: Architecture, depth: int, stage: int, num_stages: int) -> "StageShape":
        """A stage of the feature network, which has only the lowest `depth` layers and no head.

        It is cut by itself: under the policy's cut the last stages would have nothing to do. Depth L includes the
        final norm, as in Hugging Face.
        """
        layers = split_layers(depth, num_stages)[stage]
        # With the last layer: a pipeline may be longer than the network is deep.
        norm = depth == architecture.num_hidden_layers and len(layers) > 0 and layers.stop == depth
        return cls(layers.start, len(layers), stage == 0, has_final_norm=norm, has_head=False)

    def taps_within(self, taps: tuple[int, ...]) -> tuple[int, ...]:
        """Those depths (blocks from the model's input, 1-based) that are the output of one of this stage's layers."""
        return tuple(depth for depth in taps if self.first_layer < depth <= self.first_layer + self.num_layers)


def stage_parameters(architecture: Architecture, shape: StageShape, tensor_parallel: int) -> int:
    """Parameters of one rank's slice of a stage, vocabulary padding and copies included.

    Norms (and the norms of query and key heads) are whole on every tensor-parallel rank. A tied head on another
    stage than the embedding is a copy of it.
    """
    a = architecture
    norms = 2 * a.hidden_size + (2 * a.head_dim if a.qk_norm else 0)
    layer = (a.layer_parameters - norms) // tensor_parallel + norms
    assert (a.query_width + 2 * a.key_value_width) % tensor_parallel == 0, "check_world lets no other degree pass"
    embedding = padded_vocabulary(a.vocab_size, tensor_parallel) // tensor_parallel * a.hidden_size
    own_head = shape.has_head and not (a.tie_word_embeddings and shape.has_embedding)
    total = shape.num_layers * layer + embedding * (shape.has_embedding + own_head)
    return total + (a.hidden_size if shape.has_final_norm else 0)


def tensor_parallel_obstacles(architecture: Architecture, degree: int) -> list[str]:
    """Why a model cannot be cut into this many slices; empty if it can."""
    a = architecture
    obstacles = []
    for name, size in (
        ("num_attention_heads", a.num_attention_heads),
        ("intermediate_size", a.intermediate_size),
        ("hidden_size", a.hidden_size),
        ("vocabulary blocks", NUM_VOCABULARY_BLOCKS),
    ):
        if size % degree:
            obstacles.append(f"{name} {size} is not divisible by {degree}")
    groups = a.num_key_value_heads
    if groups % degree and degree % groups:
        obstacles.append(f"num_key_value_heads {groups} is neither a multiple nor a divisor of {degree}")
    elif degree > groups and a.head_dim % (degree // groups):
        obstacles.append(f"head_dim {a.head_dim} cannot be shared by {degree // groups} ranks per key-value head")
    return obstacles


def valid_tensor_parallel_sizes(architecture: Architecture) -> tuple[int, ...]:
    """All degrees that a model can be cut into."""
    return tuple(
        degree for degree in range(1, NUM_VOCABULARY_BLOCKS + 1) if not tensor_parallel_obstacles(architecture, degree)
    )
