"""Work out which layers, heads, token ids and rows each rank holds. Integers only, no torch."""

from dataclasses import dataclass

from ebft_mega.architecture.hf_config import Architecture, tapped_layers
from ebft_mega.architecture.partition import StageShape, stage_parameters
from ebft_mega.architecture.vocabulary_blocks import NUM_VOCABULARY_BLOCKS, padded_vocabulary
from ebft_mega.config.entries import tapped_fractions
from ebft_mega.config.schema import RunConfig
from ebft_mega.planning.run_plan import RunPlan


@dataclass(frozen=True)
class HeadSlice:
    """Attention heads of a tensor-parallel slice."""

    query: range
    key_value: range
    sharers: int  # slices that hold equal parts of one key-value head between them; 1: the heads are whole


@dataclass(frozen=True)
class VocabularySlice:
    """Token ids whose embedding and logits a tensor-parallel slice holds."""

    tokens: range  # may be empty in a tiny vocabulary
    padding: int  # columns that belong to no token


@dataclass(frozen=True)
class RankPart:
    """What the ranks at one (stage, slice) hold; they differ only in the rows that they read."""

    stage: int
    tensor_slice: int
    ranks: range
    policy: StageShape
    parameters: int  # of the policy's slice, before ZeRO divides it
    features: StageShape | None  # None: rl_coef is 0
    heads: HeadSlice
    vocabulary: VocabularySlice

    @property
    def has_vocabulary(self) -> bool:
        """Whether the stage embeds or predicts tokens."""
        return self.policy.has_embedding or self.policy.has_head


def head_slice(architecture: Architecture, tensor_slice: int, tensor_parallel: int) -> HeadSlice:
    """Find the heads of one slice, which are consecutive; where key-value heads are too few, slices share one."""
    heads, groups = architecture.num_attention_heads, architecture.num_key_value_heads
    sharers = max(1, tensor_parallel // groups)
    per_slice = max(1, groups // tensor_parallel)
    first = tensor_slice // sharers * per_slice
    width = heads // tensor_parallel
    return HeadSlice(range(tensor_slice * width, (tensor_slice + 1) * width), range(first, first + per_slice), sharers)


def vocabulary_slice(vocab_size: int, tensor_slice: int, tensor_parallel: int) -> VocabularySlice:
    """Whole vocabulary blocks for each slice; the blocks do not depend on the degree."""
    assert NUM_VOCABULARY_BLOCKS % tensor_parallel == 0, "check_world lets no other degree pass"
    width = padded_vocabulary(vocab_size, tensor_parallel) // tensor_parallel
    first = min(tensor_slice * width, vocab_size)
    end = min((tensor_slice + 1) * width, vocab_size)
    return VocabularySlice(range(first, end), width - (end - first))


def policy_stage(plan: RunPlan, stage: int) -> StageShape:
    """The policy's layers on a stage."""
    return StageShape.of_policy(plan.architecture, stage, plan.parallel.pipeline_parallel)


def feature_stage(config: RunConfig, plan: RunPlan, stage: int) -> StageShape:
    """The feature network's layers on a stage: its own split of the layers up to the deepest tap."""
    architecture = plan.feature_architecture
    depth = tapped_layers(tapped_fractions(config), architecture.num_hidden_layers)[-1]
    return StageShape.of_features(architecture, depth, stage, plan.parallel.pipeline_parallel)


def ranks_at(plan: RunPlan, stage: int, tensor_slice: int) -> range:
    """List the world ranks of all replicas at a (stage, slice): tensor varies fastest, then data, then pipeline."""
    tensor, data = plan.parallel.tensor_parallel, plan.parallel.data_parallel
    first = tensor_slice + tensor * data * stage
    return range(first, first + tensor * data, tensor)


def rank_parts(config: RunConfig, plan: RunPlan) -> list[RankPart]:
    """List what every (stage, slice) holds, stage by stage; each world rank is in exactly one of the parts."""
    architecture, sizes = plan.architecture, plan.parallel
    parts = []
    for stage in range(sizes.pipeline_parallel):
        shape = policy_stage(plan, stage)
        for tensor_slice in range(sizes.tensor_parallel):
            parts.append(
                RankPart(
                    stage=stage,
                    tensor_slice=tensor_slice,
                    ranks=ranks_at(plan, stage, tensor_slice),
                    policy=shape,
                    parameters=stage_parameters(architecture, shape, sizes.tensor_parallel),
                    features=feature_stage(config, plan, stage) if config.uses_rollouts else None,
                    heads=head_slice(architecture, tensor_slice, sizes.tensor_parallel),
                    vocabulary=vocabulary_slice(architecture.vocab_size, tensor_slice, sizes.tensor_parallel),
                )
            )
    return parts
