"""What a run will do and what it will need, as text: the answer of `--dry-run`. No torch.

All sizes are worked out, not measured. The memory table counts the tensors that the formulas below name;
allocator slack, communication buffers and libraries come on top.
"""

from dataclasses import dataclass

from ebft_mega.config.load import resolved_yaml
from ebft_mega.config.schema import RunConfig
from ebft_mega.config.validate import RunPlan
from ebft_mega.model.architecture import Architecture, tapped_layers

FLOAT32_BYTES = 4
GIB_BYTES = 1 << 30


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one rank. States are always there; phases follow each other, so only one counts."""

    states: dict[str, int]
    phases: dict[str, dict[str, int]]  # phase: what it needs

    @property
    def peak_bytes(self) -> int:
        """States and the largest phase."""
        return sum(self.states.values()) + max(sum(parts.values()) for parts in self.phases.values())


def element_bytes(dtype: str) -> int:
    """Bytes of one value of `train.dtype`."""
    return {"bfloat16": 2, "float32": 4}[dtype]


def feature_parameters(architecture: Architecture, fractions: tuple[float, ...]) -> int:
    """Parameters of the frozen network: embedding V * H, layers up to the deepest tap, no head.

    The final norm (H) belongs to it only if the deepest tap is the last layer.
    """
    depth = tapped_layers(fractions, architecture.num_hidden_layers)[-1]
    norm = architecture.hidden_size if depth == architecture.num_hidden_layers else 0
    embedding = architecture.vocab_size * architecture.hidden_size
    return embedding + depth * architecture.layer_parameters + norm


def zero3_state_bytes(num_parameters: int, data_parallel_size: int, dtype: str) -> dict[str, int]:
    """ZeRO-3's share of one rank, with N parameters and D replicas, b bytes each in `dtype`.

    Parameters b*N/D, gradients 4*N/D (float32 accumulation), Adam's two moments 8*N/D, and in bfloat16 a
    float32 master copy 4*N/D; in float32 the parameters are their own master.
    """
    share = -(-num_parameters // data_parallel_size)
    states = {
        "parameters": share * element_bytes(dtype),
        "gradients (float32)": share * FLOAT32_BYTES,
        "Adam moments (float32)": 2 * share * FLOAT32_BYTES,
    }
    if dtype != "float32":
        states["master parameters (float32)"] = share * FLOAT32_BYTES
    return states


def cache_bytes(architecture: Architecture, config: RunConfig) -> int:
    """Keys and values of a micro-batch's rollouts.

    Per row (last anchor + K*n*(G - 1)) tokens: the document once for all samples, and all generated tokens
    but the last of each rollout; per token and layer 2 * key-value heads * head_dim values of b bytes.
    """
    plan = config.block_plan
    tokens = plan.anchors[-1] + plan.rollouts_per_row * (plan.generate_length - 1)
    per_token = 2 * architecture.num_key_value_heads * architecture.head_dim * architecture.num_hidden_layers
    return config.train.micro_batch_size * tokens * per_token * element_bytes(config.train.dtype)


def learn_tokens_per_row(config: RunConfig) -> tuple[int, int]:
    """Document tokens and generated tokens of a row in the gradient pass.

    The document ends at the last anchor, or at P - 1 when `ce_coef` wants its targets; a rollout's last token
    predicts nothing and stays out: K*n*(G - 1).
    """
    plan = config.block_plan
    document = plan.sequence_length - 1 if config.ebft.ce_coef > 0 else plan.anchors[-1]
    generated = plan.rollouts_per_row * (plan.generate_length - 1) if config.uses_rollouts else 0
    return document, generated


def scored_rows(config: RunConfig) -> int:
    """Token rows of a packed row that the language-model head sees in the gradient pass.

    The document's P - 1 rows if `ce_coef` > 0, else the K rows before the anchors; and K*n*(G - 1) generated
    rows.
    """
    document, generated = learn_tokens_per_row(config)
    return (document if config.ebft.ce_coef > 0 else config.block_plan.num_blocks) + generated


def layer_activation_bytes(architecture: Architecture, config: RunConfig) -> int:
    """What one layer keeps of a micro-batch for its backward pass, b bytes a value.

    Per token b * (5*H + 3*Q + 4*KV + 4*I): both norms' inputs and outputs and the residual (5 H); queries and
    keys before and after the rotary embedding, values and the attention output (3 Q + 4 KV); gate, up, the
    activated gate and product (4 I). Each generated token also keeps its attention weights over the document
    and its own rollout, heads * (document + G - 1) values, as float32 and as a copy of b bytes.
    """
    document, generated = learn_tokens_per_row(config)
    width = element_bytes(config.train.dtype)
    query = architecture.num_attention_heads * architecture.head_dim
    key_value = architecture.num_key_value_heads * architecture.head_dim
    values = 5 * architecture.hidden_size + 3 * query + 4 * key_value + 4 * architecture.intermediate_size
    weights = architecture.num_attention_heads * (document + config.ebft.generate_max_len - 1)
    per_row = (document + generated) * values * width + generated * weights * (FLOAT32_BYTES + width)
    return config.train.micro_batch_size * per_row


def activation_bytes(architecture: Architecture, config: RunConfig) -> int:
    """Activations of all layers in the gradient pass.

    Without checkpointing L layers keep everything; with it each keeps its input (b*H a token) and one
    at a time is recomputed.
    """
    layer = layer_activation_bytes(architecture, config)
    if config.train.activation_checkpointing == "none":
        return architecture.num_hidden_layers * layer
    tokens = config.train.micro_batch_size * sum(learn_tokens_per_row(config))
    inputs = tokens * architecture.hidden_size * element_bytes(config.train.dtype)
    return architecture.num_hidden_layers * inputs + layer


def plan_memory(config: RunConfig, plan: RunPlan) -> MemoryPlan:
    """Memory of one rank, in bytes.

    Gathered parameters are b*N during rollouts, which hold them all, otherwise the larger of the embedding and one
    layer.
    A decode pass makes K*n logit rows per packed row, V values each.
    `rl_coef: 0` has neither a rollout phase nor a feature network.
    """
    architecture, width = plan.architecture, element_bytes(config.train.dtype)
    states = zero3_state_bytes(architecture.num_parameters, plan.data_parallel_size, config.train.dtype)
    embedding = architecture.vocab_size * architecture.hidden_size
    one_module = max(embedding, architecture.layer_parameters) * width
    phases = {}
    if config.uses_rollouts:
        frozen = feature_parameters(plan.feature_architecture, config.ebft.feature_layers)
        states["frozen feature network"] = frozen * width
        phases["rollout"] = {
            "gathered parameters": architecture.num_parameters * width,
            "keys and values": cache_bytes(architecture, config),
            "logits of one token per rollout (float32)": config.train.micro_batch_size
            * config.block_plan.rollouts_per_row
            * architecture.vocab_size
            * FLOAT32_BYTES,
        }
    logits = config.train.micro_batch_size * scored_rows(config) * architecture.vocab_size * FLOAT32_BYTES
    phases["learn"] = {
        "gathered parameters": one_module,
        "activations": activation_bytes(architecture, config),
        "scored logits (float32)": logits,
    }
    return MemoryPlan(states, phases)


def describe_run(config: RunConfig, plan: RunPlan) -> str:
    """Everything that `--dry-run` prints: configuration, blocks, data, processes and memory."""
    parts = [
        _title("Resolved configuration") + resolved_yaml(config).rstrip(),
        _title("Model") + _model_text(plan),
        _title("Blocks") + _block_text(config, plan),
        _title("Data") + _data_text(config, plan),
        _title("Memory per rank (GiB, worked out, not measured)") + _memory_text(config, plan),
    ]
    if plan.notes:
        parts.append(_title("Notes") + "\n".join(plan.notes))
    return "\n\n".join(parts)


def _title(text: str) -> str:
    return f"{text}\n{'-' * len(text)}\n"


def _table(rows: list[tuple[str, object]]) -> str:
    width = max(len(name) for name, _ in rows)
    texts = [(name, f"{value:,}" if isinstance(value, int) else str(value)) for name, value in rows]
    return "\n".join(f"{name:<{width}}  {text}" for name, text in texts)


def _model_text(plan: RunPlan) -> str:
    architecture = plan.architecture
    return _table(
        [
            ("architecture", architecture.model_type),
            ("parameters", architecture.num_parameters),
            ("layers", architecture.num_hidden_layers),
            ("vocabulary", architecture.vocab_size),
        ]
    )


def _block_text(config: RunConfig, plan: RunPlan) -> str:
    blocks, rows = plan.block_plan, config.train.global_batch_size
    depth = plan.feature_architecture.num_hidden_layers
    document, generated = learn_tokens_per_row(config)
    per_row = blocks.generated_per_row if config.uses_rollouts else 0
    features = blocks.sequence_length + blocks.generated_per_row if config.uses_rollouts else 0
    return _table(
        [
            ("tokens per row", blocks.sequence_length),
            ("blocks per row", blocks.num_blocks),
            ("first and last anchor", f"{blocks.anchors[0]}, {blocks.anchors[-1]}"),
            ("samples per block", blocks.num_samples),
            ("tokens generated per row", per_row),
            ("tokens generated per step", per_row * rows),
            ("policy rows per row (gradient pass)", document + generated),
            ("head rows per row (gradient pass)", scored_rows(config)),
            ("feature rows per row", features),
            ("feature layers", f"{tapped_layers(config.ebft.feature_layers, depth)} of {depth}"),
        ]
    )


def _data_text(config: RunConfig, plan: RunPlan) -> str:
    supply, manifest = plan.train_rows, plan.train_rows.manifest
    rows = plan.total_steps * config.train.global_batch_size
    table: list[tuple[str, object]] = [
        ("documents", manifest.documents),
        ("tokens", manifest.tokens),
        ("rows per epoch", supply.rows_per_epoch),
        ("tail tokens per epoch (no whole row)", supply.tail_tokens),
        ("optimizer steps", plan.total_steps),
        ("rows per step", config.train.global_batch_size),
        ("rows of the run", rows),
        ("tokens of the run", rows * config.data.sequence_length),
        ("epochs of the run", f"{rows / supply.rows_per_epoch:.2f}"),
        ("processes", plan.parallel.world_size),
        ("data-parallel size", plan.data_parallel_size),
        ("micro-batches per replica and step", plan.num_micro_batches),
    ]
    if plan.evaluation_rows:
        table.append(("held-out rows", f"{config.evaluation.rows:,} of {plan.evaluation_rows.rows_per_epoch:,}"))
    return _table(table)


def _memory_text(config: RunConfig, plan: RunPlan) -> str:
    memory = plan_memory(config, plan)
    rows = [(name, size) for name, size in memory.states.items()]
    rows += [(f"{phase}: {name}", size) for phase, parts in memory.phases.items() for name, size in parts.items()]
    rows.append(("peak (states and the largest phase)", memory.peak_bytes))
    return _table([(name, f"{size / GIB_BYTES:10.3f}") for name, size in rows])
