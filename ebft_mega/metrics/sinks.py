"""Metric sinks, on the one rank that writes: `metrics.jsonl`, tensorboard and the console."""

import errno
import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ebft_mega.errors import ResultsLostError
from ebft_mega.io.durable import write_bytes
from ebft_mega.io.standard_streams import output_failures
from ebft_mega.metrics.console import ConsoleSink, open_console
from ebft_mega.shown_text import shown

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """One destination of metrics; any method may raise when its destination fails."""

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
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


class JsonlSink:
    """One JSON object per logged step, on disk as soon as it is logged: a result of the run, and whole at its end.

    Lines that a full disk does not take are written as soon as it does. A file that was removed or renamed is written
    anew with all that it held; one that was replaced (by an editor, say) is continued.
    """

    name = "metrics.jsonl"

    def __init__(self, path: Path):
        self._path = path
        self._file = open(path, "a+b", buffering=0)
        self._waiting: list[bytes] = []

    @property
    def unwritten_lines(self) -> int:
        """Lines that are not in the file yet."""
        return len(self._waiting)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line; a value that is not finite becomes null, so that the file stays strict JSON.

        Raises:
            OSError: the disk is full or gone. What was written of the line is taken back, and it is tried again.
        """
        record: dict[str, float | None] = {"step": step}
        record.update({key: value if math.isfinite(value) else None for key, value in metrics.items()})
        self._waiting.append(json.dumps(record).encode() + b"\n")
        self.flush()

    def flush(self) -> None:
        """Write what is not in the file yet.

        Raises:
            OSError: as for `log`.
        """
        self._follow_name()
        while self._waiting:
            self._append(self._waiting[0])
            del self._waiting[0]

    def close(self) -> None:
        """Write what is not in the file yet, if that is possible now, and close it."""
        try:
            self.flush()
        finally:
            self._file.close()

    def _append(self, line: bytes) -> None:
        start = self._file.seek(0, os.SEEK_END)
        try:
            written = self._file.write(line)
        except OSError:
            self._file.truncate(start)
            raise
        if written != len(line):
            self._file.truncate(start)
            raise OSError(errno.ENOSPC, f"only {written} of {len(line)} bytes were written")

    def _follow_name(self) -> None:
        """Open the file that has the name now, and make it anew if none has."""
        own = os.fstat(self._file.fileno())
        try:
            named = os.stat(self._path)
        except FileNotFoundError:
            self._file.seek(0)
            write_bytes(self._path, self._file.read())
            logger.warning("%s was removed or renamed while the run was running: written anew, whole", self._path)
        else:
            if (named.st_dev, named.st_ino) == (own.st_dev, own.st_ino):
                return
            logger.warning("%s was replaced while the run was running: continued", self._path)
        self._file.close()
        self._file = open(self._path, "a+b", buffering=0)


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
            self._writer.add_scalar(shown(key), value, global_step=step)

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
        total_rows: rows that the whole run reads, for the console; None: it is not known.
    Communication: none; one rank of the job has one of these.
    """

    def __init__(
        self,
        output_dir: Path,
        total_steps: int,
        console: bool,
        resumed_step: int | None = None,
        total_rows: int | None = None,
    ):
        metrics_path = output_dir / "metrics.jsonl"
        cut_after(metrics_path, -1 if resumed_step is None else resumed_step)
        self._failed: set[str] = set()
        self._console: ConsoleSink | None = None
        if console:
            self._console = open_console(total_steps, resumed_step or 0, total_rows=total_rows)
        self._results = JsonlSink(metrics_path)
        self._sinks: list[Sink] = [self._results]
        self.show("tensorboard", lambda: self._sinks.append(TensorboardSink(output_dir / "tensorboard", resumed_step)))
        if self._console is not None:
            self._sinks.append(self._console)

    def add(self, sink: Sink) -> None:
        """Send what follows to another sink, too; it is closed with the others."""
        self._sinks.append(sink)

    def require_whole(self) -> None:
        """Check that all lines of `metrics.jsonl` are written.

        Raises:
            ResultsLostError: some could not be.
        """
        if self._results.unwritten_lines:
            raise ResultsLostError(f"metrics.jsonl lacks its last {self._results.unwritten_lines} lines")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one step's metrics everywhere.

        Args:
            step: optimizer steps done so far; 0 is before the first.
            metrics: scalars by `section/name`, in the units of the key (seconds, bytes, nats per token).
        """
        for sink in self._sinks:
            self.show(sink.name, partial(sink.log, step, metrics))
        for name, error in output_failures().items():
            self._warn_once(name, error)

    def note(self, text: str) -> None:
        """Say something to the person watching, above the progress bar, and in the rank's log."""
        logger.info("%s", text)
        if self._console is not None:
            self.show(self._console.name, partial(self._console.note, text))

    def show(self, name: str, action: Callable[[], object]) -> None:
        """Do something that only shows what happens: whatever goes wrong with it is a warning, once for each name.

        Args:
            name: of what is written.
            action: tried again at the next call: a disk that was full may have room again.
        """
        try:
            action()
        except Exception as error:  # of any kind: it may be a library's
            self._warn_once(name, error)

    def close(self) -> None:
        """Flush and close every sink; calling it twice does no harm."""
        for sink in self._sinks:
            self.show(sink.name, sink.close)
        self._sinks = []
        self._console = None

    def _warn_once(self, name: str, error: Exception) -> None:
        if name not in self._failed:
            self._failed.add(name)
            logger.warning("metrics are not reaching %s (%s); training continues", name, error)
