"""Parameters that ZeRO stage 3 partitions over the data-parallel ranks: build, gather, hold and release them."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ebft_mega.parallel.deepspeed_adapter.deepspeed_setup import import_deepspeed
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.parallel.stage_module import Loader, StageT

# Stands for a module that uses a parameter, among DeepSpeed's own, which are numbers.
HOLDER = "ebft_mega"
# Parameters are gathered this many at a time: the gathered buffer exists beside the parameters made from it.
GATHER_ELEMENTS = 2**26


def partitioned_module(
    build_stage: Callable[[], StageT], load: Loader[StageT], config: dict[str, Any], groups: ProcessGroups
) -> StageT:
    """Build and fill a stage whose parameters are partitioned as they are made, so that no rank ever holds it whole.

    Communication: over the data-parallel group, whose first rank reads the values.
    """
    deepspeed = import_deepspeed(groups)
    # No `dtype` argument: with it, DeepSpeed 0.19.8 makes every parameter bfloat16 on a CPU without float16, whatever
    # it says.
    with deepspeed.zero.Init(
        data_parallel_group=groups.data_parallel,
        config_dict_or_path=config,
        mem_efficient_linear=False,  # it replaces torch.nn.functional.linear for the whole process
    ):
        module = build_stage()

    def whole_for_writing(parameter: nn.Parameter) -> Any:
        return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)

    load(module, whole_for_writing, groups.data_parallel_rank == 0)
    return module


def whole_shape(parameter: Any) -> tuple[int, ...]:
    """Shape of a whole parameter, whether it is partitioned or not; partitioned ones look empty."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def view_of(module: StageT, build_stage: Callable[[], StageT]) -> StageT:
    """Put a stage's parameters into a new stage without engine hooks, for passes while all of them are whole.

    It is built anew because a stage holds process groups, which cannot be copied; on the meta device because it never
    owns a weight.
    """
    with torch.device("meta"):
        view = build_stage()
    for owner, twin in zip(module.modules(), view.modules(), strict=True):
        for name, parameter in owner.named_parameters(recurse=False):
            setattr(twin, name, parameter)
    return view.eval()


def gather(parameters: Iterable[Any]) -> list[Any]:
    """Make partitioned parameters whole on every rank.

    Returns:
        Those that were not whole before.
    Communication: over the data-parallel group one all-gather per `GATHER_ELEMENTS` elements. (DeepSpeed's own
        `GatheredParameters` makes one for each parameter.)
    """
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    missing = [parameter for parameter in parameters if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE]
    bucket: list[Any] = []
    for index, parameter in enumerate(missing):
        bucket.append(parameter)
        is_full = sum(member.ds_numel for member in bucket) >= GATHER_ELEMENTS
        if is_full or index == len(missing) - 1:
            bucket[0].all_gather_coalesced(bucket).wait()
            bucket = []
    return missing


def hold(parameters: Iterable[Any]) -> None:
    """Make partitioned parameters whole until the next optimizer step, which releases everything.

    DeepSpeed releases a parameter when no module uses it any more, so it is told of one more. (Its own threshold for
    parameters to keep has no effect while it records or has lost its trace of a step, as pipeline stages do.)

    Communication: that of `gather`, when it is the first time since the last step.
    """
    held = list(parameters)
    gather(held)
    for parameter in held:
        parameter.ds_active_sub_modules.add(HOLDER)


def release(parameters: Iterable[Any]) -> None:
    """Free what `gather` made; every rank keeps its partition."""
    gathered = list(parameters)
    if gathered:
        gathered[0].partition(param_list=gathered, has_been_updated=False)
