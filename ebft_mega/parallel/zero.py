"""Choose and build the training engine for a ZeRO stage (plain torch at 0, DeepSpeed at 1 to 3)."""

from collections.abc import Callable, Mapping

from ebft_mega.parallel.deepspeed_adapter.deepspeed_engine import DeepSpeedEngine
from ebft_mega.parallel.deepspeed_adapter.sharded_stage import ShardedStage
from ebft_mega.parallel.engine import ZeroEngine
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.parallel.optimizer import GradientPart, LookAtGradient, OptimizerSettings, Update
from ebft_mega.parallel.replicated import ReplicatedEngine
from ebft_mega.parallel.roles import ParameterRole
from ebft_mega.parallel.stage_module import Loader, StageRunner, StageT

__all__ = [
    "GradientPart",
    "Loader",
    "LookAtGradient",
    "OptimizerSettings",
    "ShardedStage",
    "StageRunner",
    "Update",
    "ZeroEngine",
    "make_engine",
]


def make_engine(
    build_stage: Callable[[], StageT],
    load: Loader[StageT],
    roles: Callable[[StageT], Mapping[str, ParameterRole]],
    settings: OptimizerSettings,
    groups: ProcessGroups,
) -> ZeroEngine[StageT]:
    """Build a stage, fill it with weights, and make its optimizer.

    Args:
        build_stage: makes the module, which must have matrices and vectors and whose forward(compute) is
            compute(module). At ZeRO stage 3 parameters are partitioned as they are made, so no rank ever holds the
            whole stage.
        load: fills the module given (module, context that makes one parameter whole, whether this rank reads).
        roles: what the module's parameters are to the other ranks of the replica, by name; one that is not named is
            whole on every tensor-parallel rank.
        settings, groups: see there.
    Raises:
        RuntimeError: a DeepSpeed release that was never checked, or stages with different optimizer sub-groups.
        ValueError: the module has no matrices or no vectors.
    Communication: over the data-parallel group, whose first rank reads the weights; one all-gather over the replica.
    """
    implementation = ReplicatedEngine if settings.zero_stage == 0 else DeepSpeedEngine
    return implementation(build_stage, load, roles, settings, groups)
