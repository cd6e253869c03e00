"""Wall time of the phases of a step."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.profiler import record_function

from ebft_mega.metrics.phase_memory import PhaseMemory
from ebft_mega.runtime import witness


class PhaseTimers:
    """Add up the seconds spent in named phases until `reset`, and name them in profiles.

    Args:
        synchronize: waits for the device's queued work (`torch.cuda.synchronize`), so that a phase is charged
            with its own kernels; None on a CPU.
        clock: seconds, monotonic.
        memory: measures the memory of the same phases; None: none is measured.
    Communication: none.
    """

    def __init__(
        self,
        synchronize: Callable[[], object] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        memory: PhaseMemory | None = None,
    ):
        self._synchronize = synchronize
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self.memory = memory

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the block to `name`, also when it raises; phases may be nested and repeated."""
        if self.memory is not None:
            self.memory.enter(name)
        started = self._now()
        try:
            # Always there, not only while a profile runs: it costs 5 microseconds.
            with record_function(name), witness.phase(name):
                yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._now() - started
            if self.memory is not None:
                self.memory.leave()

    def seconds(self) -> dict[str, float]:
        """Seconds by phase since the last reset."""
        return dict(self._seconds)

    def reset(self) -> None:
        """Forget everything measured so far."""
        self._seconds.clear()
        if self.memory is not None:
            self.memory.reset()

    def _now(self) -> float:
        if self._synchronize is not None:
            self._synchronize()
        return self._clock()
