"""Seconds waited for other ranks: two ranks, one of them late on purpose, through every library that communicates."""

import time
from collections.abc import Callable

import deepspeed
import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings
from torch.utils._python_dispatch import TorchDispatchMode

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.lifecycle.build import build_trainer
from ebft_mega.metrics.communication import HostStopwatch, timed_communication
from ebft_mega.parallel.deepspeed_adapter.deepspeed_setup import disable_shared_memory_collectives
from ebft_mega.parallel.groups import connect, make_process_groups
from ebft_mega.train.step import train_step
from tests.distributed.ranks import run_ranks
from tests.distributed.steps import LEARNING_RATE, Case, Layout, config_of, rows_of_step
from tests.distributed.traffic import IGNORED

LATE_SECONDS = 0.3


def asynchronous(value: torch.Tensor) -> None:
    work = dist.all_reduce(value, async_op=True)
    assert work is not None
    work.wait()


def message(value: torch.Tensor) -> None:
    """From the late rank to the other."""
    if dist.get_rank() == 1:
        dist.send(value, 0)
    else:
        dist.recv(value, 1)


def batch_of_messages(value: torch.Tensor) -> None:
    received, peer = torch.empty_like(value), 1 - dist.get_rank()
    operations = [dist.P2POp(dist.isend, value, peer), dist.P2POp(dist.irecv, received, peer)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def through_megatron_backward(value: torch.Tensor) -> None:
    """Its copy to the tensor-parallel region communicates on the way back only."""
    value.requires_grad_()
    mappings.copy_to_tensor_model_parallel_region(value, group=dist.group.WORLD).sum().backward()


WAYS: dict[str, Callable[[torch.Tensor], object]] = {
    "all-reduce": dist.all_reduce,
    "asynchronous": asynchronous,
    "objects": lambda value: dist.all_gather_object([None, None], value.tolist()),
    "barrier": lambda value: dist.barrier(),
    "message": message,
    "batch of messages": batch_of_messages,
    "megatron-core": lambda value: mappings.reduce_from_tensor_model_parallel_region(value, group=dist.group.WORLD),
    "megatron-core, backward": through_megatron_backward,
    "DeepSpeed": lambda value: deepspeed.comm.all_reduce(value),
    "DeepSpeed, asynchronous": lambda value: deepspeed.comm.allgather_fn(torch.empty(16), value, async_op=True).wait(),
}


def waits() -> dict[str, float]:
    """Seconds that this rank communicated, by way, when the second rank comes late to each."""
    connect()
    disable_shared_memory_collectives()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    found = {}
    for name, way in WAYS.items():
        stopwatch = HostStopwatch()
        dist.barrier()
        with timed_communication(stopwatch):
            if dist.get_rank() == 1:
                time.sleep(LATE_SECONDS)
            way(torch.ones(8))
        found[name] = stopwatch.seconds()
    return found


def test_the_punctual_rank_waits_and_the_late_one_does_not():
    punctual, late = run_ranks(2, waits)
    for name in WAYS:
        assert punctual[name] > LATE_SECONDS - 0.05, (name, punctual[name])
        # How soon a rank is woken is up to the machine, and the same for both.
        assert late[name] < punctual[name] - LATE_SECONDS / 2, (name, punctual[name], late[name])


def work_beside() -> float:
    """An asynchronous collective that is over before anybody waits for it."""
    connect()
    stopwatch = HostStopwatch()
    dist.barrier()
    with timed_communication(stopwatch):
        work = dist.all_reduce(torch.ones(8), async_op=True)
        time.sleep(LATE_SECONDS)
        assert work is not None
        work.wait()
    return stopwatch.seconds()


def test_work_beside_a_collective_is_not_waiting():
    assert max(run_ranks(2, work_beside)) < LATE_SECONDS


class Depth(HostStopwatch):
    """A stopwatch that knows whether it runs."""

    running = 0

    def start(self):
        self.running += 1
        return super().start()

    def stop(self, started):
        self.running -= 1
        super().stop(started)


class Unseen(TorchDispatchMode):
    """Collectives of any origin that ran while the stopwatch did not, beside the number of all."""

    def __init__(self, stopwatch: Depth):
        super().__init__()
        self.stopwatch, self.unseen, self.seen = stopwatch, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if func.namespace == "c10d" and name not in IGNORED:
            self.seen += self.stopwatch.running == 1
            if self.stopwatch.running != 1:
                self.unseen.append(name)
        return func(*args, **(kwargs or {}))


def collectives_of_a_step(layout: Layout, directory: str) -> tuple[int, list[str]]:
    groups = make_process_groups(connect(), layout.tensor, layout.pipeline)
    config = config_of(Case("plain"), directory, layout.overrides)
    architecture = Architecture.from_hf(config.model.config, "test")
    trainer = build_trainer(config, architecture, architecture, groups)
    stopwatch = Depth()
    with timed_communication(stopwatch), Unseen(stopwatch) as mode:
        train_step(trainer, rows_of_step(0, groups), 0, LEARNING_RATE)
    return mode.seen, mode.unseen


LAYOUTS = [Layout(2, 1, 1), Layout(1, 2, 1), Layout(1, 1, 2)]


@pytest.mark.parametrize("layout", [*LAYOUTS, pytest.param(Layout(2, 1, 1, 1), marks=pytest.mark.slow)], ids=str)
def test_every_collective_of_a_step_is_timed(layout, tmp_path):
    """ZeRO's gathers and reductions, megatron-core's layers, the pipeline's messages and our own."""
    for seen, unseen in run_ranks(2, collectives_of_a_step, layout, str(tmp_path)):
        assert seen > 3 and unseen == []
