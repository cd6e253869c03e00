"""What a rank's memory has to hold, worked out from sizes alone. No torch.

The formulas count the tensors that they name; allocator slack, communication buffers and libraries come on top.
In all of them b is the size of a value in `train.dtype`, t the tensor-parallel, p the pipeline-parallel and D the
data-parallel size, and widths with a prime are those of one tensor-parallel slice: heads' = heads / t, Q' = Q / t,
I' = I / t, V' = padded vocabulary / t, KV' = max(1, key-value heads / t) * head_dim (a shared head is whole where it
is computed with). H is never divided, except that under sequence parallelism the positions between layers are.
"""

from dataclasses import dataclass

from ebft_mega.config.layout import feature_stage, policy_stage
from ebft_mega.config.schema import RunConfig
from ebft_mega.config.validate import RunPlan
from ebft_mega.model.architecture import Architecture, tapped_layers
from ebft_mega.model.partition import padded_vocabulary, stage_parameters

FLOAT32_BYTES = 4
FLOAT64_BYTES = 8
# DeepSpeed's `stage3_max_live_parameters`, left at its default: what stays gathered in the gradient pass once the
# order of the layers is known.
MAX_LIVE_PARAMETERS = 10**9
NUCLEUS_BYTES = 24  # per logit, for the sort and its running sums (`rollout/sampling.py`)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one rank. States are always there; phases follow each other, so only one counts."""

    states: dict[str, int]
    phases: dict[str, dict[str, int]]  # phase: what it needs

    @property
    def state_bytes(self) -> int:
        """What is always there."""
        return sum(self.states.values())

    def phase_bytes(self, phase: str) -> int:
        """What one phase needs besides; 0 for a phase that the run does not have."""
        return sum(self.phases.get(phase, {}).values())

    @property
    def peak_bytes(self) -> int:
        """States and the largest phase."""
        return self.state_bytes + max(map(self.phase_bytes, self.phases))


@dataclass(frozen=True)
class PackedPass:
    """Positions of one pass over a micro-batch; every generated one sees the document and its own rollout."""

    rows: int
    document: int  # positions of a row
    generated: int  # positions of a row's rollouts together
    own: int  # positions of one rollout

    @property
    def tokens(self) -> int:
        """Positions per row."""
        return self.document + self.generated


def element_bytes(dtype: str) -> int:
    """Bytes of one value of `train.dtype`."""
    return {"bfloat16": 2, "float32": 4}[dtype]


def zero_state_bytes(num_parameters: int, data_parallel_size: int, dtype: str, stage: int) -> dict[str, int]:
    """One rank's states for N parameters of its slice, S = ceil(N / D) of them its share.

    Parameters b*N, gradients 4*N (float32 accumulation), Adam's two moments 8*N and a float32 master copy 4*N.
    Stage 0 divides nothing: N each. Stage 1 keeps S of the moments and the master copy, stage 2 also of the
    gradients, stage 3 also of the parameters. In float32 the parameters are their own master at stage 3; the other
    stages update a copy.
    """

    def divided_from(first_stage: int) -> int:
        return -(-num_parameters // data_parallel_size) if stage >= first_stage else num_parameters

    states = {
        "parameters": divided_from(3) * element_bytes(dtype),
        "gradients (float32)": divided_from(2) * FLOAT32_BYTES,
        "Adam moments (float32)": 2 * divided_from(1) * FLOAT32_BYTES,
    }
    if dtype != "float32" or stage < 3:
        states["master parameters (float32)"] = divided_from(1) * FLOAT32_BYTES
    return states


def vocabulary_columns(architecture: Architecture, tensor_parallel: int) -> int:
    """V', columns of a rank's logits."""
    return padded_vocabulary(architecture.vocab_size, tensor_parallel) // tensor_parallel


def key_value_width(architecture: Architecture, tensor_parallel: int) -> int:
    """KV', values of a rank's keys (and of its values) per token and layer."""
    return max(1, architecture.num_key_value_heads // tensor_parallel) * architecture.head_dim


def micro_batches_in_flight(plan: RunPlan, stage: int) -> int:
    """Micro-batches whose activations a stage holds at once under 1F1B: min(p - stage, micro-batches)."""
    return min(plan.parallel.pipeline_parallel - stage, plan.num_micro_batches)


def micro_batches_decoding(plan: RunPlan) -> int:
    """Micro-batches whose keys and values a stage holds at once: the largest group of the decode ring.

    Micro-batches go round in max(1, m // p) groups as even as possible (`parallel/pipeline.py`).
    """
    groups = max(1, plan.num_micro_batches // plan.parallel.pipeline_parallel)
    return -(-plan.num_micro_batches // groups)


def cache_bytes(config: RunConfig, plan: RunPlan, stage: int) -> int:
    """Keys and values of the rollouts that are under way on a stage.

    Per row (last anchor + K*n*(G - 1)) tokens: the document once for all samples, and all generated tokens
    but the last of each rollout; per token and layer of the stage 2 * KV' values of b bytes.
    """
    blocks = plan.block_plan
    tokens = blocks.anchors[-1] + blocks.rollouts_per_row * (blocks.generate_length - 1)
    width = key_value_width(plan.architecture, plan.parallel.tensor_parallel)
    per_token = 2 * width * policy_stage(plan, stage).num_layers * element_bytes(config.train.dtype)
    return micro_batches_decoding(plan) * config.train.micro_batch_size * tokens * per_token


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


def positions_per_rank(config: RunConfig, tokens: int) -> int:
    """Positions between layers: all, or under sequence parallelism ceil(tokens / t) of them."""
    shards = config.parallel.tensor_parallel_size if config.parallel.sequence_parallel else 1
    return -(-tokens // shards)


def layer_activation_bytes(architecture: Architecture, config: RunConfig, packed: PackedPass) -> int:
    """What one layer keeps of a micro-batch for its backward pass, b bytes a value.

    Per token between layers 5*H (both norms' inputs and outputs and the residual; under sequence parallelism a
    t-th of the tokens); per token inside b * (3*Q' + 4*KV' + 4*I'): queries and keys before and after the rotary
    embedding, values and the attention output; gate, up, the activated gate and product. Each generated token
    also keeps its attention weights over the document and its own rollout, heads' * (document + own) values, as
    float32 and as a copy of b bytes.
    """
    tensor, width = config.parallel.tensor_parallel_size, element_bytes(config.train.dtype)
    query = architecture.num_attention_heads * architecture.head_dim // tensor
    key_value = key_value_width(architecture, tensor)
    between = positions_per_rank(config, packed.tokens) * 5 * architecture.hidden_size
    inside = packed.tokens * (3 * query + 4 * key_value + 4 * architecture.intermediate_size // tensor)
    weights = attention_weight_bytes(architecture, config, packed.generated, packed.document + packed.own)
    return packed.rows * ((between + inside) * width + weights)


def attention_weight_bytes(architecture: Architecture, config: RunConfig, queries: int, keys: int) -> int:
    """Attention weights of a layer for one row: heads' * queries * keys, as float32 and as a copy of b bytes."""
    heads = architecture.num_attention_heads // config.parallel.tensor_parallel_size
    return heads * queries * keys * (FLOAT32_BYTES + element_bytes(config.train.dtype))


def learn_pass(config: RunConfig) -> PackedPass:
    """The gradient pass."""
    document, generated = learn_tokens_per_row(config)
    return PackedPass(config.train.micro_batch_size, document, generated, config.ebft.generate_max_len - 1)


def activation_bytes(config: RunConfig, plan: RunPlan, stage: int) -> int:
    """Activations of a stage's L layers in the gradient pass.

    Without checkpointing every layer keeps everything for each of the min(p - stage, m) micro-batches in flight;
    with it each keeps its input (b*H a token, under sequence parallelism a t-th of the tokens) for all of them, and
    one layer at a time is recomputed.
    """
    packed, num_layers = learn_pass(config), policy_stage(plan, stage).num_layers
    layer = layer_activation_bytes(plan.architecture, config, packed)
    in_flight = micro_batches_in_flight(plan, stage)
    if config.train.activation_checkpointing == "none":
        return in_flight * num_layers * layer
    positions = packed.rows * positions_per_rank(config, packed.tokens)
    inputs = positions * plan.architecture.hidden_size * element_bytes(config.train.dtype)
    return in_flight * num_layers * inputs + layer


def live_parameters(architecture: Architecture, num_parameters: int, tensor_parallel: int) -> int:
    """Parameters that are gathered at once when ZeRO-3 gathers layer by layer.

    All N of the slice, but no more than DeepSpeed's limit, and at least the larger of the embedding (V' * H) and a
    layer.
    """
    embedding = vocabulary_columns(architecture, tensor_parallel) * architecture.hidden_size
    layer = architecture.layer_parameters // tensor_parallel
    return min(num_parameters, max(MAX_LIVE_PARAMETERS, embedding, layer))


def plan_memory(config: RunConfig, plan: RunPlan, stage: int = 0) -> MemoryPlan:
    """Memory of one rank of a pipeline stage, in bytes; all slices of a stage need the same.

    At ZeRO stage 3 the slice's b*N parameters are gathered for the rollouts (`hold_parameters: rollout`), for the
    whole step (`step`), or layer by layer only (`none`, and the gradient pass of `rollout`); below stage 3 they are
    whole anyway. `rl_coef: 0` has neither rollouts nor a feature network.
    """
    architecture, sizes = plan.architecture, plan.parallel
    width, tensor = element_bytes(config.train.dtype), sizes.tensor_parallel
    num_parameters = stage_parameters(architecture, policy_stage(plan, stage), tensor)
    states = zero_state_bytes(num_parameters, sizes.data_parallel, config.train.dtype, config.zero.stage)
    whole = num_parameters * width
    live = live_parameters(architecture, num_parameters, tensor) * width
    hold = config.zero.hold_parameters
    gathered = {
        "rollout": live if hold == "none" else whole,
        "features": whole if hold == "step" else 0,
        "learn": whole if hold == "step" else live,
    }
    phases: dict[str, dict[str, int]] = {}
    if config.uses_rollouts:
        frozen = stage_parameters(plan.feature_architecture, feature_stage(config, plan, stage), tensor) * width
        is_sharded = config.zero.feature_network == "sharded"
        states["frozen feature network"] = -(-frozen // sizes.data_parallel) if is_sharded else frozen
        phases["rollout"] = _rollout_bytes(config, plan, stage)
        phases["features"] = _feature_bytes(config, plan, stage)
        if is_sharded:
            phases["features"]["gathered feature network"] = frozen
    phases["learn"] = _learn_bytes(config, plan, stage)
    if config.zero.stage == 3:
        for phase, parameters in gathered.items():
            if parameters and phase in phases:
                phases[phase]["gathered parameters"] = parameters
    # The gradient in the form that AdamW takes, and the square root of its second moment.
    phases["update"] = {"temporaries of AdamW (float32)": states["Adam moments (float32)"]}
    return MemoryPlan(states, phases)


def worst_stage(config: RunConfig, plan: RunPlan) -> int:
    """The pipeline stage whose ranks need the most memory; the first of equals."""
    stages = range(plan.parallel.pipeline_parallel)
    return max(stages, key=lambda stage: plan_memory(config, plan, stage).peak_bytes)


def _rollout_bytes(config: RunConfig, plan: RunPlan, stage: int) -> dict[str, int]:
    """Decoding: the cache, one layer's attention weights over it, and on the last stage K*n logit rows per row.

    A logit is there in `train.dtype` and twice in float32, before and after the division by the temperature; the
    search for a nucleus (`top_p` < 1) takes 24 bytes more.
    """
    blocks, rows = plan.block_plan, config.train.micro_batch_size
    keys = blocks.anchors[-1] + blocks.generate_length - 1
    weights = attention_weight_bytes(plan.architecture, config, blocks.rollouts_per_row, keys)
    needs = {"keys and values": cache_bytes(config, plan, stage), "attention weights of one layer": rows * weights}
    if policy_stage(plan, stage).has_head:
        columns = vocabulary_columns(plan.architecture, plan.parallel.tensor_parallel)
        logit = element_bytes(config.train.dtype) + 2 * FLOAT32_BYTES
        if config.ebft.top_p < 1:
            logit += NUCLEUS_BYTES
        needs["logits of one token per rollout"] = rows * blocks.rollouts_per_row * columns * logit
    return needs


def _feature_bytes(config: RunConfig, plan: RunPlan, stage: int) -> dict[str, int]:
    """The packed pass: one layer at a time, and the rows that are read of the stage's taps.

    The pass has P + K*n*G positions a row. K*(n + 1)*T rows of H / t values (T is 1 for `last_token`, else G) are
    kept of every tap and micro-batch in `train.dtype`, and of one micro-batch in float64.
    """
    blocks, architecture = plan.block_plan, plan.feature_architecture
    rows, ebft = config.train.micro_batch_size, config.ebft
    packed = PackedPass(rows, blocks.sequence_length, blocks.generated_per_row, blocks.generate_length)
    all_taps = tapped_layers(ebft.feature_layers, architecture.num_hidden_layers)
    taps = len(feature_stage(config, plan, stage).taps_within(all_taps))
    read = 1 if ebft.embed_method == "last_token" else blocks.generate_length
    hidden = architecture.hidden_size // plan.parallel.tensor_parallel
    values = taps * rows * blocks.num_blocks * (blocks.num_samples + 1) * read * hidden
    kept = plan.num_micro_batches * element_bytes(config.train.dtype) + FLOAT64_BYTES
    return {
        "activations of one layer": layer_activation_bytes(architecture, config, packed),
        "rows of the tapped layers": values * kept,
    }


def _learn_bytes(config: RunConfig, plan: RunPlan, stage: int) -> dict[str, int]:
    """The gradient pass: activations, and on the last stage the scored rows' V' logits.

    Logits are there in `train.dtype`, and so is their gradient; besides twice in float32, while they are divided by
    the temperature.
    """
    needs = {"activations": activation_bytes(config, plan, stage)}
    if policy_stage(plan, stage).has_head:
        columns = vocabulary_columns(plan.architecture, plan.parallel.tensor_parallel)
        logit = 2 * (element_bytes(config.train.dtype) + FLOAT32_BYTES)
        needs["scored logits and gradients"] = config.train.micro_batch_size * scored_rows(config) * columns * logit
    return needs
