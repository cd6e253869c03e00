"""Count the communication between ranks: every collective of torch.distributed, by phase, group and kind."""

from collections import Counter
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from ebft_mega.metrics.timers import PhaseTimers
from ebft_mega.parallel.groups import ProcessGroups

# Kind, and which argument's bytes count: what every rank has in the end of a gather, what it has before a reduction.
KINDS = {
    "c10d::allreduce_": ("all-reduce", 0),
    "c10d::allgather_": ("all-gather", 0),
    "c10d::_allgather_base_": ("all-gather", 0),
    "c10d::allgather_into_tensor_coalesced_": ("all-gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d::reduce_scatter_": ("reduce-scatter", 1),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "c10d::broadcast_": ("broadcast", 0),
    "c10d::alltoall_base_": ("all-to-all", 1),
    "c10d::send": ("send", 0),
    "c10d::recv_": ("receive", 0),
}
IGNORED = ("c10d::barrier",)


class PhaseNames(PhaseTimers):
    """Timers that also say which phase is under way."""

    current = "outside"

    @contextmanager
    def phase(self, name: str):
        self.current, before = name, self.current
        try:
            with super().phase(name):
                yield
        finally:
            self.current = before


class Traffic(TorchDispatchMode):
    """Calls and bytes by (phase, group, kind) while it is entered."""

    def __init__(self, groups: ProcessGroups, phases: PhaseNames):
        super().__init__()
        names = ("tensor_parallel", "pipeline_parallel", "data_parallel", "model_parallel", "embedding")
        self.groups = {getattr(groups, name).group_name: name for name in names}
        self.phases = phases
        self.calls: Counter[tuple[str, str, str]] = Counter()
        self.bytes: Counter[tuple[str, str, str]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if func.namespace == "c10d" and name not in IGNORED:
            kind, counted = KINDS[name]  # an unknown collective is an error, not a zero
            group = self.groups.get(group_name(args), "other")
            key = (self.phases.current, group, kind)
            self.calls[key] += 1
            self.bytes[key] += size_of(args[counted])
        return func(*args, **(kwargs or {}))


def group_name(arguments: tuple[Any, ...]) -> str:
    """Name of the process group among an operator's arguments."""
    for argument in arguments:
        if isinstance(argument, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(argument).group_name
            except RuntimeError:  # the reduction
                continue
    raise AssertionError("no process group")


def size_of(value: Any) -> int:
    """Bytes of tensors in nested lists."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(size_of, value))
