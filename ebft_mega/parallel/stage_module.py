"""Types through which an engine builds, fills and runs a module that it knows nothing else about."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from ebft_mega.parallel.groups import ProcessGroups

StageT = TypeVar("StageT", bound=nn.Module)  # a module whose forward(compute) is compute(module)
StageRunner = Callable[[Callable[[Any], Any]], Any]  # run(compute) is compute(stage) with whole parameters
# Fills a module: (module, context that makes one parameter whole, whether this rank reads the values).
Loader = Callable[[StageT, Callable[[nn.Parameter], AbstractContextManager[Any]], bool], None]


def runner(module: Any, recording: bool = False) -> StageRunner:
    """Make a function that runs functions on a module, recording gradients or nothing."""

    def run(compute: Callable[[Any], Any]) -> Any:
        with torch.set_grad_enabled(recording):
            return compute(module)

    return run


def replicated_module(build_stage: Callable[[], StageT], load: Loader[StageT], groups: ProcessGroups) -> StageT:
    """Build a stage that is whole on every data-parallel rank, with the values that the first of them reads.

    Communication: one broadcast per parameter over the data-parallel group.
    """
    module = build_stage().to(groups.device)

    @contextmanager
    def shared_by_the_reader(parameter: nn.Parameter) -> Iterator[None]:
        yield
        dist.broadcast(parameter.data, group=groups.data_parallel, group_src=0)

    load(module, shared_by_the_reader, groups.data_parallel_rank == 0)
    return module
