"""Small files of a run directory: the outcome (`status.json`), `environment.json`, and each rank's log."""

import contextlib
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import ebft_mega
from ebft_mega.io.durable import write_json
from ebft_mega.io.standard_streams import print_line
from ebft_mega.registry.plugin_records import plugin_records
from ebft_mega.registry.plugins import Plugin
from ebft_mega.shown_text import LogLines, without_secrets

STATUS_NAME = "status.json"
LOGS = "logs"  # one of each rank
MODEL_FOLDER = "hf"  # the final model
REPORT_NAME = "report.html"
METRICS_NAME = "metrics.jsonl"
SAMPLES_NAME = "samples.jsonl"
DATA_ERRORS_NAME = "data_errors.jsonl"
NOTES_NAME = "notes.jsonl"  # notes of the starts, and warnings: what the run's page shows of them
ENVIRONMENT_NAME = "environment.json"
RESOLVED_CONFIG_NAME = "config.resolved.yaml"
RunState = Literal["done", "stopped", "failed"]
RECORDED_PACKAGES = (
    "torch",
    "deepspeed",
    "megatron-core",
    "transformers",
    "sentencepiece",
    "tokenizers",
    "triton",
    "webdataset",
    "tensorboard",
    "numpy",
    "pydantic",
    "safetensors",
)
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def write_status(output_dir: Path, state: RunState, exit_code: int, step: int, checkpoint: str | None) -> Path:
    """Record how the run ended, last of all and atomically.

    The launchers change or swallow exit codes, so batch scripts read this file.

    Args:
        output_dir: the run directory.
        state: `done`, `stopped` (requeue me) or `failed`.
        exit_code: the code that every rank exits with.
        step: optimizer steps done.
        checkpoint: folder name of the newest complete checkpoint, None if there is none.
    """
    path = output_dir / STATUS_NAME
    outcome = {"state": state, "exit_code": exit_code, "checkpoint": checkpoint, "step": step}
    write_json(path, outcome, shared=True)  # several ranks may fail at the same time
    return path


def failure_on_record(output_dir: Path) -> int | None:
    """Exit code that a rank of this run has recorded with `failed`, None if none has."""
    return _code_on_record(output_dir, "failed")


def stop_on_record(output_dir: Path) -> int | None:
    """Exit code that a rank of this run has recorded with `stopped`, None if none has."""
    return _code_on_record(output_dir, "stopped")


def _code_on_record(output_dir: Path, state: RunState) -> int | None:
    try:
        status = json.loads((output_dir / STATUS_NAME).read_text(encoding="utf-8"))
        return int(status["exit_code"]) if status["state"] == state else None
    except (OSError, ValueError, ArithmeticError, TypeError, KeyError, RecursionError):  # none, or a damaged one
        return None


def record_failure(output_dir: Path, exit_code: int, step: int, checkpoint: str | None = None) -> int:
    """Write `failed` to `status.json` unless a rank of this run has already: the first failure is the cause.

    A rank that was stopped during the start is a cause, too: the others lose their connection to it.

    Args:
        output_dir, step, checkpoint: as for `write_status`.
        exit_code: what this rank would end with.
    Returns:
        The exit code on record, with which every rank ends.
    """
    earlier = failure_on_record(output_dir) or stop_on_record(output_dir)
    if earlier is not None:
        return earlier
    write_status(output_dir, "failed", exit_code, step, checkpoint)
    return exit_code


def describe_environment(plugins: Sequence[Plugin] = ()) -> dict[str, Any]:
    """Versions, platform, source revision and plugins: what is needed to run the same thing again."""
    packages: dict[str, str | None] = {}
    for name in RECORDED_PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    return {
        "ebft_mega": ebft_mega.__version__,
        "git_revision": _git_revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "packages": packages,
        "plugins": [each.model_dump() for each in plugin_records(plugins)],
        "command": [without_secrets(argument) for argument in sys.argv],
    }


def write_environment(output_dir: Path, extra: Mapping[str, Any] | None = None, plugins: Sequence[Plugin] = ()) -> Path:
    """Write `environment.json`.

    Args:
        output_dir: the run directory.
        plugins: those in use.
        extra: facts that only the caller knows (world size, device name); they win over ours.
    """
    path = output_dir / ENVIRONMENT_NAME
    write_json(path, {**describe_environment(plugins), **(extra or {})})
    return path


class RankLog(logging.FileHandler):
    """A log file that is made anew when it was removed or renamed, and whose failure is a warning, once.

    Args:
        path: the file; it is opened, and its folder made, when there is something to write.
    """

    def __init__(self, path: Path):
        super().__init__(path, encoding="utf-8", errors="backslashreplace", delay=True)
        self._has_failed = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record where the name leads now."""
        try:
            self._follow_name()
            super().emit(record)
        except OSError:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Say once that the file cannot be written: logs are only shown."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._has_failed:
            self._has_failed = True
            print_line(f"warning: {self.baseFilename} cannot be written ({error}); the run continues")

    def close(self) -> None:
        """Close the file; what a full disk has not taken is dropped."""
        with contextlib.suppress(OSError):
            super().close()

    def _follow_name(self) -> None:
        path = Path(self.baseFilename)
        try:
            named = path.stat()
            own = os.fstat(self.stream.fileno()) if self.stream is not None else None
            if own is None or (own.st_dev, own.st_ino) == (named.st_dev, named.st_ino):
                return
        except FileNotFoundError:
            path.parent.mkdir(exist_ok=True)  # never the run directory
        if self.stream is not None:
            stream, self.stream = self.stream, None  # as in logging itself
            with contextlib.suppress(OSError):
                stream.close()


def setup_rank_log(output_dir: Path, rank: int) -> Path:
    """Send this process's logging to `logs/rank-XXXX.log` (all) and, on rank 0, warnings to standard error.

    Safe to call again: the handlers of an earlier call are replaced.

    Args:
        output_dir: the run directory.
        rank: number of this process in the job.
    Returns:
        The log file.
    """
    directory = output_dir / LOGS
    path = directory / f"rank-{rank:04d}.log"
    handlers: list[logging.Handler] = [RankLog(path)]
    if rank == 0:
        console = logging.StreamHandler(sys.stderr)
        console.setLevel(logging.WARNING)
        handlers.append(console)
    package_logger = logging.getLogger("ebft_mega")
    for old in list(package_logger.handlers):
        package_logger.removeHandler(old)
        old.close()
    package_logger.setLevel(logging.INFO)
    # DeepSpeed prints through the root logger; our lines would appear twice.
    package_logger.propagate = False
    for handler in handlers:
        handler.setFormatter(LogLines(LOG_FORMAT))
        package_logger.addHandler(handler)
    return path


def _git_revision() -> str | None:
    """Commit of the source tree, with `-dirty` if it was changed; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
