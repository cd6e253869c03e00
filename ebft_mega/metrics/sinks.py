"""Metric sinks, on the one rank that writes: `metrics.jsonl`, tensorboard and the console."""

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ebft_mega.io.durable import write_bytes
from ebft_mega.metrics.console import ConsoleSink, open_console

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """One destination of metrics; any method may raise OSError when its destination fails."""

    name: str

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step."""

    def close(self) -> None:
        """Flush and release what is held."""


def cut_after(path: Path, last_step: int) -> int:
    """Drop the lines of `metrics.jsonl` that lie past a step, and a line that was cut short by a kill.

    Args:
        path: the file; a missing one counts as empty.
        last_step: the newest step that is kept.
    Returns:
        Number of lines dropped.
    """
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _is_kept(line, last_step)]
    if len(kept) < len(lines):
        write_bytes(path, b"".join(kept))
    return len(lines) - len(kept)


def _is_kept(line: bytes, last_step: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= last_step
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return False


class JsonlSink:
    """One JSON object per logged step, on disk as soon as it is logged."""

    name = "metrics.jsonl"

    def __init__(self, path: Path):
        self._file = open(path, "ab", buffering=0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line; a value that is not finite becomes null, so that the file stays strict JSON.

        Raises:
            OSError: the disk is full or gone. What was written of the line is taken back.
        """
        record: dict[str, float | None] = {"step": step}
        record.update({key: value if math.isfinite(value) else None for key, value in metrics.items()})
        line = json.dumps(record).encode() + b"\n"
        start = self._file.seek(0, os.SEEK_END)
        try:
            written = self._file.write(line)
        except OSError:
            self._file.truncate(start)
            raise
        if written != len(line):
            self._file.truncate(start)
            raise OSError(f"only {written} of {len(line)} bytes were written")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorboardSink:
    """The same scalars for tensorboard, in one event file per start of the run."""

    name = "tensorboard"

    def __init__(self, directory: Path, resumed_step: int | None):
        # Costs about a second and is of no use to a dry run.
        from torch.utils.tensorboard.writer import SummaryWriter

        purge_step = None if resumed_step is None else resumed_step + 1
        self._writer: Any = SummaryWriter(str(directory), purge_step=purge_step, flush_secs=30)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queue the scalars; a failure of the writing thread is raised here at one of the next steps."""
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, global_step=step)

    def close(self) -> None:
        """Flush the queue and close the event file."""
        self._writer.close()


class MetricsWriter:
    """Send each step's metrics to every sink; a sink that fails never stops the training.

    Args:
        output_dir: the run directory, which must exist.
        total_steps: optimizer steps of the whole run, for the progress bar and the time left.
        console: False writes files only.
        resumed_step: the step of the checkpoint that the run continues from; later lines are cut. None
            starts `metrics.jsonl` anew.
    Communication: none; one rank of the job has one of these.
    """

    def __init__(self, output_dir: Path, total_steps: int, console: bool, resumed_step: int | None = None):
        metrics_path = output_dir / "metrics.jsonl"
        cut_after(metrics_path, -1 if resumed_step is None else resumed_step)
        self._failed: set[str] = set()
        self._console: ConsoleSink | None = open_console(total_steps, resumed_step or 0) if console else None
        self._sinks: list[Sink] = [JsonlSink(metrics_path)]
        try:
            self._sinks.append(TensorboardSink(output_dir / "tensorboard", resumed_step))
        except OSError as error:
            self._warn_once("tensorboard", error)
        if self._console is not None:
            self._sinks.append(self._console)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one step's metrics everywhere.

        Args:
            step: optimizer steps done so far; 0 is before the first.
            metrics: scalars by `section/name`, in the units of the key (seconds, bytes, nats per token).
        """
        for sink in self._sinks:
            try:
                sink.log(step, metrics)
            except OSError as error:
                self._warn_once(sink.name, error)

    def note(self, text: str) -> None:
        """Say something to the person watching, above the progress bar, and in the rank's log."""
        logger.info(text)
        if self._console is not None:
            try:
                self._console.note(text)
            except OSError as error:
                self._warn_once(self._console.name, error)

    def close(self) -> None:
        """Flush and close every sink; calling it twice does no harm."""
        for sink in self._sinks:
            try:
                sink.close()
            except OSError as error:
                self._warn_once(sink.name, error)
        self._sinks = []
        self._console = None

    def _warn_once(self, name: str, error: OSError) -> None:
        # The next steps are still tried: a disk that was full may have room again.
        if name not in self._failed:
            self._failed.add(name)
            logger.warning("metrics are not reaching %s (%s); training continues", name, error)
