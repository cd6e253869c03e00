"""Measure this rank's time in collectives, also in those that megatron-core and DeepSpeed call.

Every collective and every message of `torch.distributed` becomes a call of a method of `ProcessGroup`, and every wait
for an asynchronous one a call of `Work.wait`. So these two classes are patched, not the many functions above them,
which libraries also import under names of their own. torch's completion hooks are no substitute: gloo has none, and
they measure how long work took, not how long a rank waited for it.
"""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist

# The methods that communicate, in any version of torch that is supported.
METHODS: dict[type, tuple[str, ...]] = {
    dist.ProcessGroup: (
        "_allgather_base",
        "_end_coalescing",
        "_reduce_scatter_base",
        "all_gather_single",
        "all_gather_single_coalesced",
        "all_to_all_single",
        "allgather",
        "allgather_coalesced",
        "allgather_into_tensor_coalesced",
        "allreduce",
        "allreduce_coalesced",
        "alltoall",
        "alltoall_base",
        "barrier",
        "broadcast",
        "gather",
        "monitored_barrier",
        "recv",
        "recv_anysource",
        "reduce",
        "reduce_scatter",
        "reduce_scatter_single",
        "reduce_scatter_single_coalesced",
        "reduce_scatter_tensor_coalesced",
        "scatter",
        "send",
    ),
    dist.Work: ("synchronize", "wait"),
}


class Stopwatch(Protocol):
    """Add up intervals."""

    def start(self) -> Any:
        """Begin an interval."""

    def stop(self, started: Any) -> None:
        """End the interval that `start` returned."""

    def seconds(self) -> float:
        """Sum of all intervals since the last reset."""

    def reset(self) -> None:
        """Forget all intervals."""


class HostStopwatch:
    """Time of the calling thread.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._seconds = 0.0

    def start(self) -> float:
        """Now."""
        return self._clock()

    def stop(self, started: float) -> None:
        """Add the time since `started`."""
        self._seconds += self._clock() - started

    def seconds(self) -> float:
        """Sum of all intervals since the last reset."""
        return self._seconds

    def reset(self) -> None:
        """Forget all intervals."""
        self._seconds = 0.0


class DeviceStopwatch:
    """Time of the CUDA stream on which a call is made: from what was queued before the call to what comes after it.

    Nothing is waited for until `seconds` is asked.

    Args:
        new_event: makes an event with timing.
    """

    def __init__(self, new_event: Callable[[], Any] = lambda: torch.cuda.Event(enable_timing=True)):
        self._new_event = new_event
        self._intervals: list[tuple[Any, Any]] = []

    def start(self) -> Any:
        """Mark the stream."""
        event = self._new_event()
        event.record()
        return event

    def stop(self, started: Any) -> None:
        """Mark the stream again."""
        self._intervals.append((started, self.start()))

    def seconds(self) -> float:
        """Sum of all intervals since the last reset; waits until the device has passed them."""
        for _, ended in self._intervals:
            ended.synchronize()
        return sum(started.elapsed_time(ended) for started, ended in self._intervals) / 1000

    def reset(self) -> None:
        """Forget all intervals."""
        self._intervals.clear()


def communication_stopwatch(device: torch.device) -> Stopwatch:
    """The stopwatch that sees waiting on this device: on a CPU the thread waits, on a GPU the stream does."""
    return DeviceStopwatch() if device.type == "cuda" else HostStopwatch()


@contextmanager
def timed_communication(stopwatch: Stopwatch) -> Iterator[None]:
    """Time everything that this process communicates meanwhile; arguments, results and errors pass unchanged.

    An asynchronous call counts for what its start and its `wait` take, not for what runs beside it. On CUDA that holds
    for calls on the current stream; collectives that DeepSpeed puts on a stream of its own count in full.

    Args:
        stopwatch: is started and stopped around each call, from whatever thread calls.
    Communication: none of its own.
    """
    originals = [
        (owner, name, vars(owner)[name]) for owner, names in METHODS.items() for name in names if name in vars(owner)
    ]
    for owner, name, _ in originals:
        setattr(owner, name, _timed(getattr(owner, name), stopwatch))
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _timed(method: Callable[..., Any], stopwatch: Stopwatch) -> Callable[..., Any]:
    @functools.wraps(method)
    def timed(*arguments: Any, **keywords: Any) -> Any:
        started = stopwatch.start()
        try:
            return method(*arguments, **keywords)
        finally:
            stopwatch.stop(started)

    return timed
