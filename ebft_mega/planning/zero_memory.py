"""What ZeRO's stages hold of parameters, gradients and optimizer state, and copy in gathers, reductions and updates.

Symbols as in `memory.py`: N parameters of a rank's slice, D data-parallel ranks, S = ceil(N / D), b bytes a value; P is
the slice's largest parameter. What a communication library copies for itself is not counted (gloo copies what it
reduces or gathers, NCCL does not). No torch.
"""

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.partition import stage_parameters
from ebft_mega.config.entries import optimizer
from ebft_mega.config.schema import RunConfig
from ebft_mega.planning.activation_memory import (
    FLOAT32_BYTES,
    element_bytes,
    key_value_width,
    query_width,
    vocabulary_columns,
)
from ebft_mega.planning.rank_layout import policy_stage
from ebft_mega.planning.run_plan import RunPlan

FLOAT64_BYTES = 8
# DeepSpeed's `stage3_max_live_parameters`, left at its default: what stays gathered in the gradient pass once the
# order of the layers is known.
MAX_LIVE_PARAMETERS = 10**9
# Elements that are gathered, reduced and updated at a time, as the engines do (`parallel/`, which imports torch).
GATHER_ELEMENTS = 2**26
REDUCE_ELEMENTS = 2**24
UPDATE_ELEMENTS = 2**22

Needs = dict[str, int]  # bytes by what they are for


def share(size: int, ranks: int) -> int:
    """Divide by the ranks, rounded up."""
    return -(-size // ranks)


def zero_state_bytes(num_parameters: int, data_parallel_size: int, dtype: str, stage: int, num_moments: int) -> Needs:
    """Bytes of one rank's states for N parameters of its slice, of which its ZeRO partition has S = ceil(N / D).

    Parameters b*N, gradients 4*N (float32 accumulation), each of the optimizer's moments 4*N (AdamW has two) and a
    float32 master copy 4*N.
    Stage 0 partitions nothing: N each. Stage 1 has S of the moments and the master copy, stage 2 also of the
    gradients (but not between steps: `gradient_bytes`), stage 3 also of the parameters. In float32 the parameters are
    their own master at stage 3; the other stages update a copy.
    """

    def divided_from(first_stage: int) -> int:
        return share(num_parameters, data_parallel_size) if stage >= first_stage else num_parameters

    states = {"parameters": divided_from(3) * element_bytes(dtype)}
    if num_moments:
        states["optimizer moments (float32)"] = num_moments * divided_from(1) * FLOAT32_BYTES
    if stage != 2:
        states["gradients (float32)"] = gradient_bytes(num_parameters, data_parallel_size, stage)
    if dtype != "float32" or stage < 3:
        states["master parameters (float32)"] = divided_from(1) * FLOAT32_BYTES
    return states


def live_parameters(architecture: Architecture, num_parameters: int, tensor_parallel: int) -> int:
    """Count the parameters that are gathered at once when ZeRO-3 gathers layer by layer.

    All N of the slice, but no more than DeepSpeed's limit, and at least the larger of the embedding (V' * H) and a
    layer.
    """
    embedding = vocabulary_columns(architecture, tensor_parallel) * architecture.hidden_size
    layer = architecture.layer_parameters // tensor_parallel
    return min(num_parameters, max(MAX_LIVE_PARAMETERS, embedding, layer))


def gathered_parameters(config: RunConfig, plan: RunPlan, num_parameters: int) -> Needs:
    """Bytes of parameters that stage 3 gathers in each phase beside the rank's share: none where that is all of them.

    `update` begins by letting go of what is held.
    """
    width = element_bytes(config.train.dtype)
    whole = num_parameters * width
    live = live_parameters(plan.architecture, num_parameters, config.parallel.tensor_parallel_size) * width
    hold = config.zero.hold_parameters
    if not partitions_parameters(config, plan):
        return {"rollout": 0, "features": 0, "learn": 0}
    return {
        "rollout": live if hold == "none" else whole,
        "features": whole if hold == "step" else 0,
        "learn": whole if hold == "step" else live,
    }


def largest_moment(moments: list[Needs]) -> Needs:
    """What is needed at the worst of a phase's moments; the first of equals."""
    worst = max(moments, key=lambda needs: sum(needs.values()))
    return {name: size for name, size in worst.items() if size}


def gradient_bytes(num_parameters: int, data_parallel_size: int, stage: int) -> int:
    """Bytes of the float32 gradients of N parameters: 4*N, from stage 2 on 4*S."""
    return (share(num_parameters, data_parallel_size) if stage >= 2 else num_parameters) * FLOAT32_BYTES


def partitions_parameters(config: RunConfig, plan: RunPlan) -> bool:
    """Whether ranks hold only a share of the parameters between passes."""
    return config.zero.stage == 3 and plan.parallel.data_parallel > 1


def largest_parameter(plan: RunPlan, stage: int) -> int:
    """P, elements of the largest parameter of a pipeline stage's slice: a matrix of the vocabulary or of a layer."""
    architecture, tensor = plan.architecture, plan.parallel.tensor_parallel
    shape = policy_stage(plan, stage)
    columns = vocabulary_columns(architecture, tensor) if shape.has_embedding or shape.has_head else 0
    query_key_value = query_width(architecture, tensor) + 2 * key_value_width(architecture, tensor)
    width = max(columns, 2 * architecture.intermediate_size // tensor, query_key_value)
    return width * architecture.hidden_size


def gathering_bytes(config: RunConfig, plan: RunPlan, stage: int) -> int:
    """Bytes of the buffer beside the parameters that are made from it when a stage is gathered as a whole."""
    if not partitions_parameters(config, plan) or config.zero.hold_parameters == "none":
        return 0
    num_parameters = _parameters(plan, stage)
    elements = min(num_parameters, GATHER_ELEMENTS + largest_parameter(plan, stage))
    return elements * element_bytes(config.train.dtype)


def reduction_bytes(config: RunConfig, plan: RunPlan, stage: int) -> int:
    """Bytes of gradients on their way from a backward pass into the float32 gradients.

    They are collected until there are `REDUCE_ELEMENTS`, k = min(N, that): at stage 2 in a buffer of b a value, of
    which a float32 copy and one by rank are made; at stage 3 as they are (b), then in float32 and in the order of the
    ranks. A larger parameter goes alone: b*P and in bfloat16 4*P. Stage 1 adds each gradient as it comes, in bfloat16
    through a float32 copy; stage 0 needs none.
    """
    width = element_bytes(config.train.dtype)
    largest = largest_parameter(plan, stage)
    converted = 0 if width == FLOAT32_BYTES else FLOAT32_BYTES
    collected = min(_parameters(plan, stage), REDUCE_ELEMENTS)
    alone = (width + converted) * largest
    if config.zero.stage == 0:
        return 0
    if config.zero.stage == 1:
        return alone
    if config.zero.stage == 2:
        return width * collected + max((width + converted) * collected, alone)
    together = (width + converted + FLOAT32_BYTES) * collected
    return max(together, alone) if largest > REDUCE_ELEMENTS else together


def update_needs(config: RunConfig, plan: RunPlan, stage: int, num_parameters: int) -> Needs:
    """Temporaries of an update: for the norm, then for the optimizer.

    The norm is that of a float64 copy of a gradient, one parameter's after another (or of what the rank has of it),
    except at stage 1 in bfloat16. The optimizer makes its float32 temporaries (AdamW two) of `UPDATE_ELEMENTS` of a
    parameter, from stage 1 on of all that the rank has.
    """
    ranks, zero_stage = plan.parallel.data_parallel, config.zero.stage
    temporaries = optimizer(config).temporaries
    largest = largest_parameter(plan, stage)
    stepped = largest  # which the optimizer updates at once
    if zero_stage > 0:
        stepped = share(num_parameters, ranks)
        largest = share(largest, ranks) if zero_stage == 3 else min(largest, stepped)
    if zero_stage == 1 and config.train.dtype == "bfloat16":
        largest = 0
    return largest_moment(
        [
            {"a gradient in float64": largest * FLOAT64_BYTES},
            {"temporaries of the optimizer (float32)": temporaries * min(stepped, UPDATE_ELEMENTS) * FLOAT32_BYTES},
        ]
    )


def _parameters(plan: RunPlan, stage: int) -> int:
    """N of a pipeline stage."""
    return stage_parameters(plan.architecture, policy_stage(plan, stage), plan.parallel.tensor_parallel)
