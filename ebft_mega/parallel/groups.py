"""Process groups, made once at start-up and passed to whoever communicates."""

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ebft_mega.parallel.megatron import ProcessGroupCollection

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)


@dataclass(frozen=True)
class ProcessGroups:
    """The ranks that this process talks to, one group per parallel axis.

    `data_parallel` ranks hold different rows and share the ZeRO partitions; `tensor_parallel` ranks hold slices of
    one layer; `pipeline_parallel` ranks hold consecutive layers.
    """

    data_parallel: dist.ProcessGroup
    tensor_parallel: dist.ProcessGroup
    pipeline_parallel: dist.ProcessGroup
    device: torch.device

    @property
    def data_parallel_rank(self) -> int:
        """This process's place among the ranks with other rows."""
        return dist.get_rank(self.data_parallel)

    @property
    def data_parallel_size(self) -> int:
        """How many ranks share a global batch."""
        return dist.get_world_size(self.data_parallel)

    @property
    def is_first(self) -> bool:
        """Whether this process writes what a job writes once."""
        return dist.get_rank() == 0

    def megatron(self) -> ProcessGroupCollection:
        """The groups in megatron-core's own wrapper, for its layers."""
        # A context-parallel group of one: the tensor-parallel group is the only group of size one at hand while
        # context parallelism is refused, and megatron-core asks only for its size.
        return ProcessGroupCollection(tp=self.tensor_parallel, pp=self.pipeline_parallel, cp=self.tensor_parallel)


def local_device() -> torch.device:
    """The accelerator of this process (by LOCAL_RANK), or the CPU."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def connect() -> torch.device:
    """Join the job's process group from the launcher's environment; alone if there is no launcher.

    Communication: creates the default process group (NCCL on GPUs, gloo on CPUs).
    Returns:
        The device of this process.
    """
    device = local_device()
    if not dist.is_initialized():
        alone = "RANK" not in os.environ
        if alone:
            # DeepSpeed reads these itself.
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=COLLECTIVE_TIMEOUT,
            store=dist.HashStore() if alone else None,
            rank=0 if alone else -1,
            world_size=1 if alone else -1,
        )
    return device


def make_process_groups(device: torch.device) -> ProcessGroups:
    """One group per axis, for a job in which all ranks are data parallel.

    Communication: every rank creates the same groups in the same order.
    """
    world_size = dist.get_world_size()
    alone = [dist.new_group([rank]) for rank in range(world_size)][dist.get_rank()]
    return ProcessGroups(
        data_parallel=dist.new_group(list(range(world_size))),
        tensor_parallel=alone,
        pipeline_parallel=alone,
        device=device,
    )
