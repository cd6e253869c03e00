"""Where and how communication is timed; between ranks: `tests/distributed/metrics/test_communication_time.py`."""

import threading

import pytest
import torch
import torch.distributed as dist

from ebft_mega.metrics.communication import (
    METHODS,
    DeviceStopwatch,
    HostStopwatch,
    communication_stopwatch,
    timed_communication,
)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Event:
    """Stands for a CUDA event: recorded when the stream's time is what the clock says."""

    def __init__(self, clock, log):
        self.clock, self.log = clock, log

    def record(self):
        self.at = self.clock()

    def synchronize(self):
        self.log.append("synchronize")

    def elapsed_time(self, other):
        assert self.log, "the device has not passed the events yet"
        return (other.at - self.at) * 1000


def test_every_method_that_makes_work_is_timed():
    """A method that a new torch adds shows up here."""
    returning_work = {
        name
        for name in vars(dist.ProcessGroup)
        if "-> c10d::Work" in (getattr(dist.ProcessGroup, name).__doc__ or "")
        or "-> torch._C._distributed_c10d.Work" in (getattr(dist.ProcessGroup, name).__doc__ or "")
    }
    assert len(returning_work) > 10
    assert returning_work <= set(METHODS[dist.ProcessGroup])
    assert set(METHODS[dist.Work]) <= set(vars(dist.Work))


def test_host_stopwatch_adds_intervals_up_until_reset():
    clock = Clock()
    stopwatch = HostStopwatch(clock)
    for seconds in (1.0, 2.5):
        started = stopwatch.start()
        clock.now += seconds
        stopwatch.stop(started)
        clock.now += 100.0
    assert stopwatch.seconds() == 3.5
    stopwatch.reset()
    assert stopwatch.seconds() == 0.0


def test_device_stopwatch_waits_for_the_device_only_when_it_is_read():
    clock, log = Clock(), []
    stopwatch = DeviceStopwatch(lambda: Event(clock, log))
    for seconds in (1.0, 2.5):
        started = stopwatch.start()
        clock.now += seconds
        stopwatch.stop(started)
        clock.now += 100.0
    assert log == []
    assert stopwatch.seconds() == pytest.approx(3.5)
    assert log == ["synchronize"] * 2
    stopwatch.reset()
    assert stopwatch.seconds() == 0.0


def test_stopwatch_by_device():
    assert isinstance(communication_stopwatch(torch.device("cpu")), HostStopwatch)
    assert isinstance(communication_stopwatch(torch.device("cuda", 0)), DeviceStopwatch)


class CallCount:
    """A stopwatch that counts its intervals."""

    def __init__(self):
        self.started = self.stopped = 0

    def start(self):
        self.started += 1

    def stop(self, started):
        self.stopped += 1

    def seconds(self):
        return float(self.stopped)

    def reset(self):
        self.started = self.stopped = 0


def test_results_work_and_errors_pass_and_nothing_stays_behind(groups):
    before = {name: vars(owner)[name] for owner, names in METHODS.items() for name in names if name in vars(owner)}
    calls, value = CallCount(), torch.tensor([3.0])
    with pytest.raises(ValueError, match="mine"), timed_communication(calls):
        assert dist.all_reduce(value, group=groups.data_parallel) is None
        work = dist.all_reduce(value, group=groups.data_parallel, async_op=True)
        assert isinstance(work, dist.Work) and work.wait() is True
        assert (calls.started, calls.stopped) == (4, 4)
        with pytest.raises(RuntimeError):  # a rank that does not exist
            groups.data_parallel.broadcast(value, root=5)
        raise ValueError("mine")
    assert calls.started == calls.stopped == 5
    assert value.item() == 3.0
    assert before == {
        name: vars(owner)[name] for owner, names in METHODS.items() for name in names if name in vars(owner)
    }
    dist.all_reduce(value, group=groups.data_parallel)
    assert calls.started == 5


def test_calls_of_other_threads_are_seen(groups):
    """Backward passes run in threads of their own on a GPU."""
    calls = CallCount()
    with timed_communication(calls):
        thread = threading.Thread(target=dist.barrier, kwargs={"group": groups.data_parallel})
        thread.start()
        thread.join(60)
    assert calls.stopped >= 1
