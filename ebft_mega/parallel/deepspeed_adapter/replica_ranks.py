"""Make DeepSpeed count and combine gradients correctly over tensor- and pipeline-parallel ranks.

DeepSpeed itself knows data-parallel ranks only.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.parallel.optimizer import SharedGradients


class MegatronUnit:
    """Our groups under the names by which DeepSpeed asks for them.

    It has no tensor-parallel methods on purpose: DeepSpeed counts in norms every parameter of tensor-parallel rank 0
    (stages 1 and 2) or model-parallel rank 0 (stage 3), whatever its marks. Without those methods it takes the second
    for the first. On that rank everything counts; on rank 0 of a later stage a tied weight would count twice.
    """

    def __init__(self, groups: ProcessGroups):
        """Take the groups of this process."""
        self._groups = groups

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Ranks with other rows."""
        return self._groups.data_parallel

    def get_data_parallel_world_size(self) -> int:
        """Number of those."""
        return self._groups.data_parallel_size

    def get_data_parallel_rank(self) -> int:
        """Place among those."""
        return self._groups.data_parallel_rank

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """All ranks of one replica: norms are summed over them, so the pipeline's ranks must be in it."""
        return self._groups.model_parallel

    def get_model_parallel_world_size(self) -> int:
        """Number of those."""
        return dist.get_world_size(self._groups.model_parallel)

    def get_model_parallel_rank(self) -> int:
        """Place among those."""
        return dist.get_rank(self._groups.model_parallel)


def check_traces_within(groups: ProcessGroups) -> None:
    """Let ranks compare the order in which they gather parameters only with those they gather with.

    DeepSpeed compares over the whole world when a forward pass begins: pipeline stages have other modules, which is an
    error, and begin at other times, which is a deadlock.
    """
    from deepspeed.runtime.zero import partitioned_param_coordinator

    check = functools.partial(assert_same_over, groups.data_parallel, groups.device)
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = check


def assert_same_over(group: dist.ProcessGroup, device: torch.device, values: Sequence[int]) -> None:
    """Raise if this rank has other integers than the first one of its group.

    Raises:
        RuntimeError: it has.
    Communication: two broadcasts.
    """
    length = torch.tensor(len(values), device=device)
    dist.broadcast(length, group=group, group_src=0)
    expected = torch.tensor(values, dtype=torch.long, device=device)
    if len(values) != length:
        expected = torch.zeros(int(length), dtype=torch.long, device=device)
    dist.broadcast(expected, group=group, group_src=0)
    if expected.tolist() != list(values):
        raise RuntimeError(f"rank {dist.get_rank()} runs modules {list(values)}, its peers {expected.tolist()}")


def mark_counted(module: nn.Module, shared: SharedGradients) -> None:
    """Say which parameters count in the global gradient norm: each one once over the replica.

    By itself DeepSpeed counts all of model-parallel rank 0 and elsewhere what megatron-core's initialisers marked,
    which here did not run: norms, the clipping and so the update would be silently wrong on every later stage.
    """
    uncounted = set(shared.uncounted)
    for parameter in module.parameters():
        marked: Any = parameter
        marked.model_parallel = marked.tensor_model_parallel = parameter not in uncounted


def check_equal_sub_groups(number: int, groups: ProcessGroups) -> None:
    """Refuse ranks of a replica with different numbers of optimizer sub-groups.

    DeepSpeed sums the norm of one after the other over the replica; a rank with more would wait indefinitely.

    Raises:
        RuntimeError: on every rank of the replica.
    Communication: one all-gather over the replica.
    """
    numbers = [torch.zeros((), dtype=torch.long, device=groups.device) for _ in range(groups.model_parallel.size())]
    dist.all_gather(numbers, torch.tensor(number, device=groups.device), group=groups.model_parallel)
    found = [int(value) for value in numbers]
    if len(set(found)) > 1:
        raise RuntimeError(f"the ranks of a replica have {found} optimizer sub-groups; they must have equally many")
