"""Estimate the memory that each rank needs, from sizes alone. No torch.

The formulas count the tensors that they name; allocator slack, communication buffers and libraries come on top.
In all of them b is the size of a value in `train.dtype`, t the tensor-parallel, p the pipeline-parallel and D the
data-parallel size, B the rows of a micro-batch and m the micro-batches of a step; widths with a prime are those of
one tensor-parallel slice: heads' = heads / t, Q' = Q / t, I' = I / t, V' = padded vocabulary / t,
KV' = max(1, key-value heads / t) * head_dim (a shared head is whole where it is computed with). H is never divided,
except that under sequence parallelism the positions between layers are. No two rollouts are taken to begin alike
(`ebft.merge_equal_prefixes` saves what it saves): the plan holds for every model and all data.
"""

from dataclasses import dataclass

from ebft_mega.architecture.hf_config import tapped_layers
from ebft_mega.architecture.partition import stage_parameters
from ebft_mega.architecture.vocabulary_blocks import HEAD_ROWS
from ebft_mega.config.entries import advantage_estimator, feature_map, optimizer, tapped_fractions, uses_critic
from ebft_mega.config.schema import Reuse, RunConfig
from ebft_mega.critic.critic_memory import CriticMemory
from ebft_mega.planning.activation_memory import (
    FLOAT32_BYTES,
    Pass,
    document_length,
    element_bytes,
    feature_pass,
    hidden_bytes,
    key_value_width,
    layer_backward_bytes,
    layer_forward_bytes,
    layer_saved_bytes,
    learn_pass,
    query_width,
    scored_rows,
    vocabulary_columns,
)
from ebft_mega.planning.rank_layout import feature_stage, policy_stage
from ebft_mega.planning.run_plan import RunPlan
from ebft_mega.planning.zero_memory import (
    Needs,
    gathered_parameters,
    gathering_bytes,
    gradient_bytes,
    largest_moment,
    reduction_bytes,
    update_needs,
    zero_state_bytes,
)

FLOAT64_BYTES = 8
SAMPLED_LOGIT_BYTES = 12  # per logit, at most: in `train.dtype` and twice in float32
NUCLEUS_LOGIT_BYTES = 28  # the same with `top_p` < 1: a sort and its running sums (`rollout/sampling.py`)


@dataclass(frozen=True)
class Choices:
    """The resolved values of keys that may be `auto`."""

    reuse_rollout: Reuse
    feature_network_is_sharded: bool


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one rank. States are always allocated; phases follow each other, so only the largest counts."""

    states: Needs
    phases: dict[str, Needs]  # each at its largest moment

    @property
    def state_bytes(self) -> int:
        """Sum of the states."""
        return sum(self.states.values())

    def phase_bytes(self, phase: str) -> int:
        """Sum up what one phase needs besides the states; 0 for a phase that the run does not have."""
        return sum(self.phases.get(phase, {}).values())

    @property
    def peak_bytes(self) -> int:
        """States and the largest phase."""
        return self.state_bytes + max(map(self.phase_bytes, self.phases))


def micro_batches_in_flight(plan: RunPlan, stage: int) -> int:
    """Count the micro-batches whose activations a stage holds at once under 1F1B: min(p - stage, micro-batches)."""
    return min(plan.parallel.pipeline_parallel - stage, plan.num_micro_batches)


def micro_batches_decoding(plan: RunPlan) -> int:
    """Count the micro-batches whose keys and values a stage holds at once: the largest group of the decode ring.

    Micro-batches go round in max(1, m // p) groups as even as possible (`parallel/pipeline.py`).
    """
    groups = max(1, plan.num_micro_batches // plan.parallel.pipeline_parallel)
    return -(-plan.num_micro_batches // groups)


def cache_bytes(config: RunConfig, plan: RunPlan, stage: int, document: int, tokens: int) -> int:
    """Bytes of the keys and values of unfinished rollouts on a stage.

    The document is stored once for all samples; per token and layer of the stage 2 * KV' values of b bytes.

    Args:
        document, tokens: positions of the document and tokens of each rollout that are in it.
    """
    width = key_value_width(plan.architecture, plan.parallel.tensor_parallel)
    per_token = 2 * width * policy_stage(plan, stage).num_layers * element_bytes(config.train.dtype)
    positions = document + plan.block_plan.rollouts_per_row * tokens
    return micro_batches_decoding(plan) * config.train.micro_batch_size * positions * per_token


def saved_bytes(config: RunConfig, plan: RunPlan, stage: int, reuse: Reuse, document: int, tokens: int) -> int:
    """Bytes that a stage saves of one micro-batch's rollout passes until its gradient is taken.

    `checkpoints`: the input of each of its L layers, and on the last stage the last layer's output: b*H a position
    each. `activations`: what each layer saves for its backward pass; of token t of a rollout the keys and values of
    all t tokens so far (2 * t * KV') in the place of its projection (Q' + 3 * KV'), and of the document's keys and
    values a copy. That is two-part attention; flex and dense save for every pass a copy of all keys and values,
    (G - 1) * 2 * KV' * (D + R * G) a row and layer.

    Args:
        document, tokens: positions of the document and tokens of each rollout that have been read.
    """
    if reuse == "off":
        return 0
    architecture, shape, blocks = plan.architecture, policy_stage(plan, stage), plan.block_plan
    packed = Pass(config.train.micro_batch_size, document + blocks.rollouts_per_row * tokens)
    if reuse == "checkpoints":
        return (shape.num_layers + shape.has_head) * hidden_bytes(architecture, config, packed)
    tensor = plan.parallel.tensor_parallel
    query, key_value = query_width(architecture, tensor), key_value_width(architecture, tensor)
    grown = tokens * (tokens + 1) * key_value - tokens * (query + 3 * key_value)
    cached = packed.rows * (2 * key_value * document + blocks.rollouts_per_row * grown)
    layer = layer_saved_bytes(architecture, config, packed) + cached * element_bytes(config.train.dtype)
    return shape.num_layers * layer


def head_chunk_bytes(rows: int, dtype: str) -> int:
    """Bytes per vocabulary column for the gradient of `rows` scored rows, `HEAD_ROWS` of them at a time.

    Per row of a chunk the logit (b) and a float32 copy at its temperature, in bfloat16 for a moment two.
    """
    width = element_bytes(dtype)
    copies = 1 if width == FLOAT32_BYTES else 2
    return min(rows, HEAD_ROWS) * (width + copies * FLOAT32_BYTES)


def largest_chunk_bytes(config: RunConfig, rows: int) -> int:
    """The same of a micro-batch's scored rows; entropies are of other chunks, with a float32 copy more."""
    dtype = config.train.dtype
    if config.ebft.entropy_coef == 0:
        return head_chunk_bytes(rows, dtype)
    targets = config.train.micro_batch_size * document_length(config)
    of_targets = head_chunk_bytes(targets, dtype) + min(targets, HEAD_ROWS) * FLOAT32_BYTES
    return max(of_targets, head_chunk_bytes(rows - targets, dtype))


def plan_memory(config: RunConfig, plan: RunPlan, choices: Choices, stage: int = 0) -> MemoryPlan:
    """Estimate the bytes of one rank of a pipeline stage; all slices of a stage need the same.

    At ZeRO stage 3 the slice's b*N parameters are gathered for the rollouts (`hold_parameters: rollout`), for the
    whole step (`step`), or layer by layer only (`none`, and the gradient pass of `rollout`); below stage 3 they are
    whole anyway. What is saved of the rollouts stays through features and learning. `rl_coef: 0` has neither rollouts
    nor a feature network.
    """
    architecture, sizes = plan.architecture, plan.parallel
    width, tensor = element_bytes(config.train.dtype), sizes.tensor_parallel
    num_parameters = stage_parameters(architecture, policy_stage(plan, stage), tensor)
    moments = len(optimizer(config).moments)
    states = zero_state_bytes(num_parameters, sizes.data_parallel, config.train.dtype, config.zero.stage, moments)
    gathered = gathered_parameters(config, plan, num_parameters)
    phases: dict[str, Needs] = {}
    if config.uses_rollouts:
        frozen = stage_parameters(plan.feature_architecture, feature_stage(config, plan, stage), tensor) * width
        is_sharded = choices.feature_network_is_sharded
        states["frozen feature network"] = -(-frozen // sizes.data_parallel) if is_sharded else frozen
        if critic := critic_memory(config, plan, stage):
            states["token critic"] = critic.state_bytes
        phases["rollout"] = _rollout_needs(config, plan, stage, choices.reuse_rollout)
        phases["features"] = _feature_needs(config, plan, stage, choices.reuse_rollout)
        if is_sharded:
            phases["features"]["gathered feature network"] = frozen
    phases["learn"] = _learn_needs(config, plan, stage, choices.reuse_rollout)
    for phase in phases:
        if gathered[phase]:
            phases[phase]["gathered parameters"] = gathered[phase]
    phases["update"] = _update_needs(config, plan, stage, num_parameters)
    if config.zero.stage == 2:
        # They are made by a step's first backward pass and freed by its update.
        for phase in ("learn", "update"):
            phases[phase]["gradients (float32)"] = gradient_bytes(num_parameters, sizes.data_parallel, 2)
    return MemoryPlan(states, phases)


def worst_stage(config: RunConfig, plan: RunPlan, choices: Choices) -> int:
    """Find the pipeline stage whose ranks need the most memory; the first of equals."""
    stages = range(plan.parallel.pipeline_parallel)
    return max(stages, key=lambda stage: plan_memory(config, plan, choices, stage).peak_bytes)


def peak_bytes(config: RunConfig, plan: RunPlan, choices: Choices) -> int:
    """Peak bytes of the ranks of the worst stage."""
    return plan_memory(config, plan, choices, worst_stage(config, plan, choices)).peak_bytes


def critic_memory(config: RunConfig, plan: RunPlan, stage: int) -> CriticMemory | None:
    """Sizes of the token critic on a stage's ranks; None: the run has none."""
    if not uses_critic(config):
        return None
    blocks, vocabulary, tensor = plan.block_plan, plan.architecture.vocab_size, plan.parallel.tensor_parallel
    taps = feature_stage(config, plan, stage).taps_within(_taps(config, plan))
    width = plan.feature_architecture.hidden_size // tensor
    columns = vocabulary_columns(plan.architecture, tensor)
    has_padding = policy_stage(plan, stage).has_head and columns * tensor > vocabulary
    return CriticMemory(
        vocabulary,
        min(advantage_estimator(config).critic_settings().rank, plan.architecture.hidden_size),
        len(taps) * feature_map(config).vectors(blocks.generate_length) * width,
        blocks.generate_length,
        blocks.num_samples,
        config.train.micro_batch_size * blocks.num_blocks,
        plan.num_micro_batches,
        feature_map(config).is_mean_of_tokens,
        columns if has_padding else 0,
    )


def _taps(config: RunConfig, plan: RunPlan) -> tuple[int, ...]:
    return tapped_layers(tapped_fractions(config), plan.feature_architecture.num_hidden_layers)


def _rollout_needs(config: RunConfig, plan: RunPlan, stage: int, reuse: Reuse) -> Needs:
    """Decoding: the cache, what is saved of the passes, and one layer's pass or a chunk of logits.

    The largest of two moments: the end of the last micro-batches' documents, and their last tokens. The last stage
    draws from rows of the document also where rollouts agree with it.
    """
    blocks, rows, critic = plan.block_plan, config.train.micro_batch_size, critic_memory(config, plan, stage)
    document = blocks.anchors[-1] if reuse == "off" else document_length(config)
    later, decoding = blocks.generate_length - 1, micro_batches_decoding(plan)
    before, documents = plan.num_micro_batches - decoding, Pass(rows, document)

    def at(tokens: int, temporaries: Needs) -> Needs:
        begun, whole = (saved_bytes(config, plan, stage, reuse, document, read) for read in (tokens, later))
        # Saved activations contain what the cache holds.
        cached = 0 if reuse == "activations" else cache_bytes(config, plan, stage, document, tokens)
        saved = before * whole + decoding * begun
        needs = {f"saved {reuse} of the rollouts": saved, "keys and values": cached}
        if critic is not None:
            needs["mean vectors of the token critic"] = critic.means_bytes + critic.table_bytes
        if reuse == "off" and policy_stage(plan, stage).has_head:  # otherwise they are saved anyway
            needs["hidden states of the documents"] = decoding * hidden_bytes(plan.architecture, config, documents)
        return needs | temporaries

    def layer(tokens: int) -> Needs:
        return {"one layer": layer_forward_bytes(plan.architecture, config, Pass(rows, tokens))}

    moments = [{"buffer of a gather": gathering_bytes(config, plan, stage)}]
    moments += [at(0, layer(document)), at(later, layer(blocks.rollouts_per_row))]
    if policy_stage(plan, stage).has_head:
        logit = NUCLEUS_LOGIT_BYTES if config.ebft.top_p < 1 else SAMPLED_LOGIT_BYTES
        columns = vocabulary_columns(plan.architecture, plan.parallel.tensor_parallel)
        in_chunk = max(1, HEAD_ROWS // (rows * blocks.num_samples)) * rows * blocks.num_samples
        chunk = min(in_chunk, rows * blocks.rollouts_per_row)
        moments.append(at(later, {"a chunk of logits": chunk * columns * logit}))
    return largest_moment(moments)


def _feature_needs(config: RunConfig, plan: RunPlan, stage: int, reuse: Reuse) -> Needs:
    """The packed pass, a layer at a time, or the Gram matrices of a micro-batch; and the rows read from tapped layers.

    The deepest tapped layer counts as a whole one, though only rows that are read go through its MLP. K*(n + 1)*T rows
    of H / t values (T positions of a window, which the feature map chooses) are stored of every tap of the stage and of
    every micro-batch in `train.dtype`. Gram matrices are made of them in float64, one micro-batch at a time and, for
    their squares, their scaled copies and what is pooled of these, one tap at a time. For a token critic the features
    of a micro-batch are put side by side, rows too where it credits tokens one by one (`critic/critic_memory.py`).
    """
    blocks, architecture = plan.block_plan, plan.feature_architecture
    packed, method = feature_pass(config), feature_map(config)
    taps = len(feature_stage(config, plan, stage).taps_within(_taps(config, plan)))
    read = len(method.positions(blocks.generate_length))
    hidden = architecture.hidden_size // plan.parallel.tensor_parallel
    of_one = packed.rows * blocks.num_blocks * (blocks.num_samples + 1) * hidden
    values = of_one * read
    pooled = of_one * method.vectors(blocks.generate_length) if read > 1 else 0  # of a single row it is the row itself
    saved = saved_bytes(config, plan, stage, reuse, document_length(config), blocks.generate_length - 1)
    needs = {
        f"saved {reuse} of the rollouts": plan.num_micro_batches * saved,
        "rows of the tapped layers": plan.num_micro_batches * taps * values * element_bytes(config.train.dtype),
    }
    grams = needs | {"Gram matrices (float64)": ((taps + 1) * values + pooled) * FLOAT64_BYTES}
    critic, moments = critic_memory(config, plan, stage), [grams]
    if critic is not None:
        name = "token critic"
        kept = of_one * method.vectors(blocks.generate_length) + values * method.is_mean_of_tokens
        before = critic.held_bytes(plan.num_micro_batches - 1)
        beside = {"features side by side (float64)": taps * kept * FLOAT64_BYTES}
        twice = {key: 2 * size for key, size in beside.items()}
        moments = [grams | {name: before}, needs | twice | {name: before}]
        moments.append(needs | beside | {name: before + critic.taking_bytes})
        needs = needs | {"mean vectors of the token critic": critic.means_bytes}
    return largest_moment([needs | {"one layer": layer_forward_bytes(architecture, config, packed)}, *moments])


def _learn_needs(config: RunConfig, plan: RunPlan, stage: int, reuse: Reuse) -> Needs:
    """The gradient: at the head, in the first layer that is differentiated, or at the embedding.

    Saved activations or checkpoints exist for all m micro-batches, those of a forward pass in learning for the
    min(p - stage, m) in flight: everything that each layer saves, or with checkpointing each layer's input. What was
    only checkpointed is recomputed one layer at a time.
    """
    architecture, shape, packed = plan.architecture, policy_stage(plan, stage), learn_pass(config)
    layer = layer_saved_bytes(architecture, config, packed)
    if reuse == "off":
        name, held = "activations", micro_batches_in_flight(plan, stage)
        recomputes = config.train.activation_checkpointing == "full"
        of_each = shape.num_layers * (hidden_bytes(architecture, config, packed) if recomputes else layer)
    else:
        name, held, recomputes = f"saved {reuse} of the rollouts", plan.num_micro_batches, reuse == "checkpoints"
        later = plan.block_plan.generate_length - 1
        of_each = saved_bytes(config, plan, stage, reuse, document_length(config), later)

    columns = vocabulary_columns(architecture, plan.parallel.tensor_parallel)
    matrix = columns * architecture.hidden_size * element_bytes(config.train.dtype)
    # A tied weight collects its head's gradient until the embedding's comes.
    tied = matrix if architecture.tie_word_embeddings and shape.has_head and shape.has_embedding else 0
    moments = [
        {
            name: held * of_each,
            "one layer, recomputed": layer if recomputes else 0,
            "gradients of one layer": layer_backward_bytes(architecture, config, packed),
            "gradient of the head's matrix": tied,
        }
    ]
    reduced, critic = reduction_bytes(config, plan, stage), critic_memory(config, plan, stage)
    if config.zero.stage == 1:
        # Each as it comes; the largest is the embedding's, which comes last, or the head's.
        moments.append({name: (held - 1) * of_each, "gradients being reduced": reduced})
    else:
        moments[0]["gradients being reduced"] = reduced
    if shape.has_embedding:
        moments.append({name: (held - 1) * of_each, "gradients of head and embedding": matrix + tied})
    if shape.has_head:
        rows = packed.rows * scored_rows(config)
        row_bytes = architecture.hidden_size * element_bytes(config.train.dtype)
        head: Needs = {
            name: held * of_each,
            "scored rows and their gradient": 4 * rows * row_bytes,
            "a chunk of logits": columns * largest_chunk_bytes(config, rows),
            "gradient of the head's matrix": matrix,
        }
        if critic is not None:
            head["values of a chunk's tokens"] = min(rows, HEAD_ROWS) * columns * FLOAT32_BYTES
            head["mean vectors of scored rows"] = critic.means_bytes // plan.num_micro_batches
        moments.append(head)
    if critic is not None:
        held_by_critic = critic.held_bytes(plan.num_micro_batches) + critic.directions_bytes + critic.table_bytes
        moments = [moment | {"token critic": held_by_critic} for moment in moments]
    return largest_moment(moments)


def _update_needs(config: RunConfig, plan: RunPlan, stage: int, num_parameters: int) -> Needs:
    """Temporaries of the optimizer's update, then of the token critic's, beside what it has of the step."""
    needs, critic = update_needs(config, plan, stage, num_parameters), critic_memory(config, plan, stage)
    if critic is None:
        return needs
    held = critic.held_bytes(plan.num_micro_batches)
    return largest_moment([needs | {"token critic": held}, {"token critic": held + critic.learning_bytes}])
