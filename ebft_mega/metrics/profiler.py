"""Profile some steps with torch's profiler and write traces for Perfetto or `chrome://tracing`."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

logger = logging.getLogger(__name__)


class StepProfiler:
    """Record a few steps in a row and write them to one file per rank.

    A context: leaving it early ends the recording without a file.

    Args:
        steps: which steps, counted from 0; empty for none.
        directory: is made for the file.
        rank: number of this process in the job.
        device: on a GPU its kernels are recorded, too.
        announce: called with a line that says where the files are; None on ranks that print nothing.
    Communication: none; each rank records what it does itself.
    """

    def __init__(
        self, steps: range, directory: Path, rank: int, device: torch.device, announce: Callable[[str], None] | None
    ):
        self._steps = steps
        self._path = directory / f"rank-{rank:04d}.json.gz"
        self._announce = announce
        self._activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        self._running: profile | None = None

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End a recording that is still running, without a file."""
        if self._running is not None:
            self._running.stop()
            self._running = None

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Run a step, recorded as `step N` (N counts from 1, as in metrics) if it is one of those to record.

        The recording begins before the first of them and is written after the last, outside of the block.
        """
        if step not in self._steps:
            yield
            return
        if self._running is None:
            self._running = profile(activities=self._activities)
            self._running.start()
        with record_function(f"step {step + 1}"):
            yield
        if step == self._steps[-1]:
            self._running.stop()
            self._write(self._running)
            self._running = None

    def _write(self, recorded: profile) -> None:
        """Write the file; like any output but the model, it is not worth stopping the training for."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(self._path))
        except Exception as error:  # of any kind: torch reports a full disk as one of its own
            logger.warning("the profile could not be written (%s); training continues", error)
            return
        if self._announce is not None:
            first, last = self._steps[0] + 1, self._steps[-1] + 1
            self._announce(f"profile of steps {first} to {last}: {self._path.parent} (one file per rank)")
