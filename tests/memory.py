"""What a function really allocates, for comparison with what the planner says it does."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from torch.profiler import ProfilerActivity, profile

Result = TypeVar("Result")


def peak_tensor_bytes(function: Callable[[], Result]) -> tuple[Result, int]:
    """Call a function and count the most bytes that were live at once of what torch allocated meanwhile.

    Exact: the profiler has a record of every block that torch's CPU allocator hands out or takes back, with the
    bytes that were asked for, in all threads that work for the call (the backward's too) and also for scratch
    tensors inside a kernel, which never reach Python. What existed before the call counts neither when it is there
    nor when it is freed. Not seen: scratch of libraries that allocate by themselves (MKL, oneDNN), numpy, files
    mapped into memory. Works on a CPU, and not inside another profile.

    Returns:
        What the function returned; bytes, those of the returned tensors included.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = function()
    return result, most_live(_blocks(recorded))


def most_live(blocks: Iterable[tuple[int, int]]) -> int:
    """The most bytes held at once, from (address, bytes; below 0: the block is given back) in the order of time."""
    live: dict[int, int] = {}
    now = peak = 0
    for address, size in blocks:
        if size > 0:
            live[address] = size
            now += size
            peak = max(peak, now)
        else:
            now -= live.pop(address, 0)  # 0: it is older than the first of these
    return peak


def _blocks(recorded: profile) -> Iterator[tuple[int, int]]:
    """What the profiler recorded, as `most_live` reads it."""
    events = list(_with_children(recorded.profiler.kineto_results.experimental_event_tree()))
    allocations = [event for event in events if type(event.extra_fields).__name__ == "_ExtraFields_Allocation"]
    for event in sorted(allocations, key=lambda event: event.start_time_ns):
        yield event.extra_fields.ptr, event.extra_fields.alloc_size


def _with_children(events: list[Any]) -> Iterator[Any]:
    waiting = list(reversed(events))
    while waiting:
        event = waiting.pop()
        yield event
        waiting.extend(reversed(event.children))
