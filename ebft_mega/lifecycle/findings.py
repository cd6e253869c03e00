"""Look at a run directory: which results of which run lie there. Reads names and small files, changes nothing."""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebft_mega.checkpoint.commit import CHECKPOINTS, LATEST, complete_folders, leftovers, step_of
from ebft_mega.checkpoint.saved_run import read_run
from ebft_mega.config.yaml_source import MAX_WRITTEN_VALUES, read_yaml
from ebft_mega.errors import EXIT_HANG, InputProblems, Problem
from ebft_mega.io.input_errors import NO_FILE, file_obstacle
from ebft_mega.io.output_directory import hidden_siblings
from ebft_mega.lifecycle.run_record import RECORD_NAME, RunRecord
from ebft_mega.model.weights.weight_files import stored_tensors
from ebft_mega.runtime.run_files import (
    DATA_ERRORS_NAME,
    ENVIRONMENT_NAME,
    LOGS,
    METRICS_NAME,
    MODEL_FOLDER,
    NOTES_NAME,
    REPORT_NAME,
    RESOLVED_CONFIG_NAME,
    SAMPLES_NAME,
    STATUS_NAME,
)
from ebft_mega.runtime.run_lock import LOCK_NAME

PREVIOUS = "previous"  # what `--fresh` has set aside
UNFINISHED_MOVE = f"{PREVIOUS}/.unfinished"  # names the folder into which a killed start was setting results aside
# Names of a run directory under which nothing else may stand.
OWN_FILES = (
    *(METRICS_NAME, REPORT_NAME, STATUS_NAME, RECORD_NAME, LOCK_NAME, RESOLVED_CONFIG_NAME, ENVIRONMENT_NAME),
    *(SAMPLES_NAME, DATA_ERRORS_NAME, NOTES_NAME, UNFINISHED_MOVE),
    *(f"{MODEL_FOLDER}/{RECORD_NAME}", f"{CHECKPOINTS}/{LATEST}"),
)
OWN_FOLDERS = (CHECKPOINTS, PREVIOUS, LOGS)
# Ranks of one start look at a directory at slightly different times; what is older than this they all see.
SETTLED_SECONDS = 10.0
_STEPS = range(2**63)
_TAIL_BYTES = 2**20  # of metrics.jsonl, more than its last line


@dataclass(frozen=True)
class Findings:
    """What lies in a run directory."""

    output: Path
    record: RunRecord | None  # of the run; None: it cannot be told which it was
    has_model: bool  # a whole final model is there
    model: RunRecord | None  # what its directory says of it
    model_step: int | None  # optimizer steps that it has taken; None: there is none, or it is not known
    checkpoints: tuple[int, ...]  # steps of the complete ones, most first
    logged_step: int  # the last one in metrics.jsonl; -1: none
    has_results: bool  # anything of a run is there

    @property
    def newest_checkpoint(self) -> int | None:
        """Steps of the newest complete checkpoint."""
        return next(iter(self.checkpoints), None)

    @property
    def is_finished(self) -> bool:
        """Whether the run that is there has its final model or the checkpoint of its last step."""
        steps = self.record.steps if self.record is not None else None
        newest = self.newest_checkpoint
        return self.has_model or (newest is not None and steps is not None and newest >= steps)

    @property
    def words(self) -> str:
        """Say what is there, for people."""
        model = f"{MODEL_FOLDER}/ of step {self.model_step}" if self.model_step is not None else f"{MODEL_FOLDER}/"
        parts = [model] * self.has_model
        if self.checkpoints:
            many = "s" if len(self.checkpoints) > 1 else ""
            parts.append(f"checkpoint{many} of step{many} {', '.join(map(str, reversed(self.checkpoints)))}")
        if self.logged_step >= 0:
            parts.append(f"metrics until step {self.logged_step}")
        kind = "a finished run" if self.is_finished else "an unfinished run"
        if self.record is not None and self.record.steps is not None:
            kind += f" of {self.record.steps} steps"
        return f"{kind} ({', '.join(parts) or 'nothing but its configuration'})"


def look(output: Path) -> Findings:
    """Find out which results of which run a directory holds.

    Raises:
        InputProblems: a record is damaged, or a newer version of this program has written it.
        OSError: the directory cannot be read.
    """
    root = output / CHECKPOINTS
    checkpoints = tuple(step for folder in complete_folders(root) if (step := step_of(folder.name)) is not None)
    model_folder = output / MODEL_FOLDER
    has_model = is_whole_model(model_folder)
    model = RunRecord.read(model_folder / RECORD_NAME) if has_model else None
    own = RunRecord.read(output / RECORD_NAME)
    logged_step = last_logged_step(output / METRICS_NAME)
    record = own or model or _record_of_earlier_version(output)
    model_step = None
    if has_model:
        model_step = model.step if model is not None else _step_of_unmarked_model(own, record, logged_step)
    has_results = (
        record is not None
        or has_model
        or bool(checkpoints)
        or bool(leftovers(root))
        or any((output / name).exists() for name in (METRICS_NAME, REPORT_NAME, "tensorboard"))
    )
    return Findings(output, record, has_model, model, model_step, checkpoints, logged_step, has_results)


def strange_entries(output: Path) -> Iterator[Problem]:
    """List what stands under the name of one of a run's files and is no file, or of one of its folders and is none.

    Whoever opens a FIFO waits for its other end. Folders may be links, to another disk for instance; files may not.
    """
    logs = sorted(f"{LOGS}/{path.name}" for path in (output / LOGS).glob("rank-*.log"))
    for name in (*OWN_FILES, *logs):
        path = output / name
        # Writing would change a file elsewhere, and reading would take one for the run's.
        obstacle = f"a link to {os.readlink(path)}" if path.is_symlink() else file_obstacle(path)
        if obstacle not in (None, NO_FILE):
            yield Problem(str(path), "output_dir", obstacle, "a file, or nothing of that name")
    for name in OWN_FOLDERS:
        path = output / name
        if os.path.lexists(path) and not path.is_dir():
            yield Problem(str(path), "output_dir", file_obstacle(path) or "a file", "a folder, or nothing of that name")


def is_whole_model(directory: Path) -> bool:
    """Whether a directory holds a whole Hugging Face model, going by names, sizes and headers."""
    return (directory / "config.json").is_file() and not stored_tensors(directory)[1]


def last_logged_step(path: Path) -> int:
    """Read the step of the last whole line of `metrics.jsonl`; -1 if there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return -1
    for line in reversed(lines):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if type(step) is int and step in _STEPS:
            return step
    return -1


def is_settled(output: Path, is_alone: bool) -> bool:
    """Whether all ranks of a start see the same in a directory, so that they need not be connected to agree.

    It is not where a run holds the lock, where a killed one was just replacing something, or where something has
    changed a moment ago.

    Args:
        is_alone: there is one rank, and so no other that could have looked a moment before.
    """
    if any(output.glob(f"{LOCK_NAME}*")) or (output / UNFINISHED_MOVE).exists():
        return False
    if hidden_siblings(output / MODEL_FOLDER) or any(leftovers(output / CHECKPOINTS)):
        return False
    if is_alone:
        return True
    latest = time.time() - SETTLED_SECONDS
    names = (".", MODEL_FOLDER, CHECKPOINTS, METRICS_NAME, REPORT_NAME, STATUS_NAME, RECORD_NAME)
    return all(_changed_at(output / name) < latest for name in names)


def status_says_done(output: Path) -> bool:
    """Whether `status.json` is there and says that the run is done."""
    try:
        status: Any = json.loads((output / STATUS_NAME).read_text(encoding="utf-8"))
        return bool(status["state"] == "done")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def failure_of_last_start(output: Path) -> list[str]:
    """Say how the last start in a run directory failed, if `status.json` says that it did."""
    try:
        status: Any = json.loads((output / STATUS_NAME).read_text(encoding="utf-8"))
        state, code, step = status["state"], status["exit_code"], status["step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    if state != "failed" or type(code) is not int:
        return []
    why = " (a hang: its stacks are in logs/)" if code == EXIT_HANG else ""
    return [f"the last start failed with exit code {code}{why}, after step {step}"]


def _changed_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _record_of_earlier_version(output: Path) -> RunRecord | None:
    """The record of a run whose version kept none: from its newest readable checkpoint, else its configuration."""
    for folder in complete_folders(output / CHECKPOINTS):
        try:
            record = RunRecord.of_checkpoint(read_run(folder))
        except InputProblems:
            continue  # the start passes over it, too
        own = _configuration(output)
        return record if own is None else record.model_copy(update={"steps": own.steps})
    return _configuration(output)


def _configuration(output: Path) -> RunRecord | None:
    try:
        tree = read_yaml(
            (output / RESOLVED_CONFIG_NAME).read_text(encoding="utf-8"), RESOLVED_CONFIG_NAME, MAX_WRITTEN_VALUES
        ).value
    except (OSError, UnicodeDecodeError):
        return None
    return RunRecord.of_configuration(tree) if isinstance(tree, dict) else None


def _step_of_unmarked_model(own: RunRecord | None, record: RunRecord | None, logged_step: int) -> int | None:
    """Steps of a model of an earlier version, which did not write them down; None if they cannot be inferred."""
    if own is not None and own.model_step is not None:
        return own.model_step
    steps = record.steps if record is not None else None
    return steps if logged_step in (-1, steps) else None
