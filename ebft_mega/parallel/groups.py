"""Process groups of all parallel axes, made once at start-up and passed to the functions that communicate."""

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ebft_mega.parallel.megatron import ProcessGroupCollection
from ebft_mega.parallel.rendezvous import meet
from ebft_mega.runtime.listening import require_interfaces, stay_on_loopback

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)


@dataclass(frozen=True)
class ProcessGroups:
    """The process groups of this rank, one for each parallel axis.

    Ranks are numbered with the tensor-parallel axis fastest, then data, then pipeline: the axis that
    communicates most stays within a machine.
    """

    data_parallel: dist.ProcessGroup  # other rows, same weights: ZeRO partitions
    tensor_parallel: dist.ProcessGroup  # same rows, other slices of each layer
    pipeline_parallel: dist.ProcessGroup  # same rows, other layers
    model_parallel: dist.ProcessGroup  # all ranks of one replica: tensor x pipeline
    embedding: dist.ProcessGroup  # first and last stage of one pipeline, which both hold a tied embedding
    alone: dist.ProcessGroup  # this rank by itself
    device: torch.device

    @property
    def data_parallel_rank(self) -> int:
        """This process's rank among the replicas, which have other rows."""
        return dist.get_rank(self.data_parallel)

    @property
    def data_parallel_size(self) -> int:
        """Number of replicas that a global batch is divided over."""
        return dist.get_world_size(self.data_parallel)

    @property
    def tensor_parallel_rank(self) -> int:
        """Index of the slice of each layer that this process holds."""
        return dist.get_rank(self.tensor_parallel)

    @property
    def tensor_parallel_size(self) -> int:
        """Number of slices that each layer is cut into."""
        return dist.get_world_size(self.tensor_parallel)

    @property
    def pipeline_rank(self) -> int:
        """Index of the stage that this process holds."""
        return dist.get_rank(self.pipeline_parallel)

    @property
    def pipeline_size(self) -> int:
        """Number of stages that the layers are cut into."""
        return dist.get_world_size(self.pipeline_parallel)

    @property
    def is_first_stage(self) -> bool:
        """Whether this process's stage reads tokens."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this process's stage predicts tokens."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def is_world_first(self) -> bool:
        """Whether this is rank 0 of the world, which writes what a job writes once."""
        return dist.get_rank() == 0

    def megatron(self) -> ProcessGroupCollection:
        """Wrap the groups for megatron-core's layers."""
        # Layers number themselves, and context parallelism is refused: both groups are asked for size and rank alone.
        return ProcessGroupCollection(tp=self.tensor_parallel, pp=self.alone, cp=self.alone)


def local_device() -> torch.device:
    """Choose the accelerator of this process (by LOCAL_RANK), or the CPU."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def connect(timeout: datetime.timedelta = COLLECTIVE_TIMEOUT, configuration: str = "") -> torch.device:
    """Join the job's process group from the launcher's environment; alone if there is no launcher.

    Communication: creates the default process group (NCCL on GPUs, gloo on CPUs).
    Args:
        timeout: after which a collective that some rank never joined fails on the others.
        configuration: tells starts of different runs apart where the launcher tells nothing.
    Returns:
        The device of this process.
    Raises:
        SurroundingsError: the ranks cannot meet (`meet`), or gloo is told to listen where it cannot.
    """
    # megatron-core overlaps the all-reduces of its backward pass only when kernels start in the order of the calls.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    device = local_device()
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            # DeepSpeed reads these itself.
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        backend = "nccl" if device.type == "cuda" else "gloo"
        if world_size > 1:
            stay_on_loopback(os.environ)
            if backend == "gloo":
                require_interfaces(os.environ)
        # A rank alone needs no port.
        store = dist.HashStore() if world_size == 1 else meet(os.environ, configuration)
        store.set_timeout(timeout)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
    return device


def make_process_groups(
    device: torch.device,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    timeout: datetime.timedelta = COLLECTIVE_TIMEOUT,
) -> ProcessGroups:
    """Make one group per axis; the data-parallel size is what the other two leave of the world.

    Args:
        timeout: as for `connect`; torch gives a new group its own default instead of the world's.
    Communication: every rank creates its groups in the same order, with their members.
    """
    tensor, pipeline = tensor_parallel_size, pipeline_parallel_size
    world_size = dist.get_world_size()
    data = world_size // (tensor * pipeline)
    assert tensor * pipeline * data == world_size, "check_world refuses every other layout"

    def place(rank: int) -> tuple[int, int, int]:
        """A rank's tensor, data and pipeline coordinates."""
        return rank % tensor, rank // tensor % data, rank // (tensor * data)

    def group(key: Callable[[int, int, int], object]) -> dist.ProcessGroup:
        """The group of this rank when ranks with equal `key(*place)` belong together."""
        own = key(*place(dist.get_rank()))
        ranks = [rank for rank in range(world_size) if key(*place(rank)) == own]
        # Only its members make a group: a thousand ranks would wait for each other at each of thousands of groups.
        made = dist.new_group(ranks, timeout=timeout, use_local_synchronization=True)
        assert isinstance(made, dist.ProcessGroup), "this rank is a member"
        return made

    def ends(tensor_rank: int, data_rank: int, stage: int) -> object:
        is_end = stage in (0, pipeline - 1)
        return (tensor_rank, data_rank, None if is_end else stage)

    stages = group(lambda t, d, p: (t, d))
    # Over NCCL a group's first communication must not be messages between some of its ranks, which a pipeline's are.
    dist.all_reduce(torch.zeros(1, device=device), group=stages)
    return ProcessGroups(
        data_parallel=group(lambda t, d, p: (t, p)),
        tensor_parallel=group(lambda t, d, p: (d, p)),
        pipeline_parallel=stages,
        model_parallel=group(lambda t, d, p: d),
        embedding=group(ends),
        alone=group(lambda t, d, p: (t, d, p)),
        device=device,
    )
