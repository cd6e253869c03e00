"""Bytes of the activations that passes over a micro-batch allocate and save, from sizes alone. No torch.

Symbols as in `memory.py`: b bytes a value, t tensor-parallel ranks; widths with a prime are those of one slice.
The counts are those of the modules as they are (megatron-core's layer in plain torch), measured in
`tests/unit/planning/test_memory_measured.py`. Rollouts are counted as if no two began alike: what merging them saves
depends on the model and the data, and a step may be without any. Not counted are the index tensors of a forest
(`ebft_mega/forest.py`), about 40 + 8 * (t + 1) bytes for token t of a rollout, a hundredth of its hidden states.
"""

from dataclasses import dataclass

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.vocabulary_blocks import padded_vocabulary
from ebft_mega.config.schema import RunConfig

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Pass:
    """Positions of one pass over a micro-batch."""

    rows: int  # B
    tokens: int  # S, positions of a row

    @property
    def positions(self) -> int:
        """B * S."""
        return self.rows * self.tokens


def element_bytes(dtype: str) -> int:
    """Bytes of one value of `train.dtype`."""
    return {"bfloat16": 2, "float32": 4}[dtype]


def vocabulary_columns(architecture: Architecture, tensor_parallel: int) -> int:
    """V', columns of a rank's logits."""
    return padded_vocabulary(architecture.vocab_size, tensor_parallel) // tensor_parallel


def query_width(architecture: Architecture, tensor_parallel: int) -> int:
    """Q', values of a rank's queries per token and layer."""
    return architecture.query_width // tensor_parallel


def key_value_width(architecture: Architecture, tensor_parallel: int) -> int:
    """KV', values of a rank's keys (and of its values) per token and layer."""
    return max(1, architecture.num_key_value_heads // tensor_parallel) * architecture.head_dim


def document_length(config: RunConfig) -> int:
    """Document positions of the policy's pass: up to the last anchor, or P - 1 where its own tokens are scored."""
    return config.block_plan.document_length(with_targets=config.uses_targets)


def learn_tokens_per_row(config: RunConfig) -> tuple[int, int]:
    """Count document tokens and generated tokens of a row in the policy's pass.

    A rollout's last token predicts nothing and stays out: K*n*(G - 1).
    """
    plan = config.block_plan
    generated = plan.rollouts_per_row * (plan.generate_length - 1) if config.uses_rollouts else 0
    return document_length(config), generated


def scored_rows(config: RunConfig) -> int:
    """Count the positions of a row that go through the language-model head in the gradient pass.

    The document's P - 1 positions if its own tokens are scored, else the K positions before the anchors; and
    K*n*(G - 1) generated ones.
    """
    document, generated = learn_tokens_per_row(config)
    return (document if config.uses_targets else config.block_plan.num_blocks) + generated


def learn_pass(config: RunConfig) -> Pass:
    """The policy's packed pass, which the rollout phase runs token by token and the gradient pass differentiates."""
    return Pass(config.train.micro_batch_size, sum(learn_tokens_per_row(config)))


def feature_pass(config: RunConfig) -> Pass:
    """The feature network's pass: whole documents and whole rollouts, P + K*n*G positions a row."""
    plan = config.block_plan
    return Pass(config.train.micro_batch_size, plan.sequence_length + plan.generated_per_row)


def positions_between_layers(config: RunConfig, packed: Pass) -> int:
    """Count a rank's positions of a pass between layers: all, or with sequence parallelism ceil(B * S / t)."""
    shards = config.parallel.tensor_parallel_size if config.parallel.sequence_parallel else 1
    return -(-packed.positions // shards)


def hidden_bytes(architecture: Architecture, config: RunConfig, packed: Pass) -> int:
    """Hidden states between two layers: b*H a position."""
    positions = positions_between_layers(config, packed)
    return positions * architecture.hidden_size * element_bytes(config.train.dtype)


def layer_saved_bytes(architecture: Architecture, config: RunConfig, packed: Pass) -> int:
    """Bytes that one layer saves of a micro-batch for its backward pass, with its output and without its input.

    Per position between layers 6*H: both norms' results before and after their weights (a norm fused into one kernel
    saves 4*H in all), the sum of residual and attention, the output. Per token inside 4*Q' + 3*KV' + 3*I': the
    projection, queries and keys after the rotary embedding, the attention's result in the layout of its kernels and in
    that of the next projection; gate, up, and their product.
    With q/k norms 2*Q' + KV' more. Also one float32 per token and head for the attention's normaliser, and
    4 * head_dim values a position for rotary angles: rows of a micro-batch share one sequence.
    """
    tensor, width = config.parallel.tensor_parallel_size, element_bytes(config.train.dtype)
    query, key_value = query_width(architecture, tensor), key_value_width(architecture, tensor)
    inside = 4 * query + 3 * key_value + 3 * architecture.intermediate_size // tensor
    if architecture.qk_norm:
        inside += 2 * query + key_value
    values = positions_between_layers(config, packed) * 6 * architecture.hidden_size + packed.positions * inside
    angles = packed.positions * 4 * architecture.head_dim
    normalisers = packed.positions * architecture.num_attention_heads // tensor * FLOAT32_BYTES
    return (values + angles) * width + normalisers


def layer_forward_bytes(architecture: Architecture, config: RunConfig, packed: Pass) -> int:
    """Largest allocation of one layer for a micro-batch without recording gradients, its input included.

    Per position between layers 3*H; per token inside the larger of 3*I' (the MLP) and 8*Q' + 2*KV' (two-part
    attention of rollouts: projection, rotary embedding, and both parts in the order of their kernel).
    """
    tensor = config.parallel.tensor_parallel_size
    attention = 8 * query_width(architecture, tensor) + 2 * key_value_width(architecture, tensor)
    inside = max(attention, 3 * architecture.intermediate_size // tensor)
    values = positions_between_layers(config, packed) * 3 * architecture.hidden_size + packed.positions * inside
    return values * element_bytes(config.train.dtype)


def layer_backward_bytes(architecture: Architecture, config: RunConfig, packed: Pass) -> int:
    """Bytes that the backward pass of one layer allocates besides what the layer has saved.

    Per position between layers 2*H. Per token the larger of 3*I', while the MLP's activation is differentiated, and
    7*Q' + 5*KV' - 3*I', while the attention is: the MLP's saved values are freed by then. And the gradient of the
    largest weight, 2*I' * H values.
    """
    tensor, hidden = config.parallel.tensor_parallel_size, architecture.hidden_size
    inner = architecture.intermediate_size // tensor
    in_attention = 7 * query_width(architecture, tensor) + 5 * key_value_width(architecture, tensor) - 3 * inner
    between = positions_between_layers(config, packed) * 2 * hidden
    values = between + packed.positions * max(3 * inner, in_attention) + 2 * inner * hidden
    return values * element_bytes(config.train.dtype)
