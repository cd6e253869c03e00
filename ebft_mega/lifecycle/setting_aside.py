"""Set the results in a run directory aside (`--fresh`), and finish what killed starts have left half done there."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from ebft_mega.config.schema import RunConfig
from ebft_mega.errors import ConfigError, InputProblems, Problem
from ebft_mega.io.durable import sync_directory, write_bytes
from ebft_mega.io.output_directory import hidden_siblings
from ebft_mega.lifecycle.findings import PREVIOUS, UNFINISHED_MOVE, failure_of_last_start, is_whole_model
from ebft_mega.lifecycle.run_record import RECORD_NAME, RunRecord
from ebft_mega.lifecycle.standing import Action, Standing, standing_of
from ebft_mega.planning.input_places import input_places
from ebft_mega.planning.run_plan import RunPlan
from ebft_mega.runtime.run_files import MODEL_FOLDER
from ebft_mega.runtime.run_lock import LOCK_NAME
from ebft_mega.runtime.stop_requests import SAVE_NAME, STOP_NAME

LOGS = "logs"
DATE_FORMAT = "%Y-%m-%dT%H-%M-%SZ"  # UTC; no colons, which some file systems and tools do not take
# Set by Slurm and torchrun in a start that is not the first one of its job.
RESTART_COUNTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")


@dataclass(frozen=True)
class Fresh:
    """What `--fresh` asks for in this start."""

    is_asked: bool = False
    restarted_by: str = ""  # the variable that says that the job has begun before; empty: it has not
    keeps: tuple[Path, ...] = ()  # files and folders that stay where they are

    @classmethod
    def of(cls, is_asked: bool, keeps: Sequence[Path], environment: Mapping[str, str] = os.environ) -> "Fresh":
        """Find out whether the option acts in this start.

        Args:
            keeps: what the job itself reads or writes, if it lies in the run directory.
        """
        restarted = [name for name in RESTART_COUNTS if environment.get(name, "0").strip() not in ("", "0")]
        job = environment.get("SLURM_JOB_ID")
        own_logs = (Path(LOGS) / f"slurm-{job}-",) if job is not None else ()
        return cls(is_asked, next(iter(restarted), "") if is_asked else "", (*keeps, *own_logs))

    @property
    def acts(self) -> bool:
        """Whether results are set aside."""
        return self.is_asked and not self.restarted_by

    @property
    def notes(self) -> tuple[str, ...]:
        """Say where the option does nothing."""
        text = f"--fresh does nothing in a start that is not the first one of its job ({self.restarted_by} is set)"
        return (text,) if self.restarted_by else ()


def require_inputs_elsewhere(config: RunConfig) -> None:
    """Check that nothing which the run reads would be set aside.

    Raises:
        ConfigError: something lies in `output_dir`.
    """
    places = {key: value for key, value in input_places(config).items() if _is_inside(value, config.output_dir)}
    if places:
        expected = f"a place outside {config.output_dir}, everything in which --fresh sets aside"
        raise ConfigError([Problem(config.place(key), key, str(place), expected) for key, place in places.items()])


def planned_standing(config: RunConfig, plan: RunPlan, fresh: Fresh) -> Standing:
    """Say what a start would do, for the dry run.

    Raises:
        ConfigError: it would be refused.
    """
    if plan.lacks("checkpoint.resume"):
        words = f"checkpoint.resume: what a start from {config.checkpoint.resume} would do is seen once it is there."
        return Standing(Action.RESUME, words)
    if not fresh.acts:
        standing = standing_of(config, plan)
        return replace(standing, notes=(*fresh.notes, *standing.notes))
    require_inputs_elsewhere(config)
    elsewhere = config.model_copy(update={"output_dir": config.output_dir / PREVIOUS / ".nothing"})
    standing = standing_of(elsewhere, plan)
    there = _to_move(config.output_dir, fresh.keeps)
    names = sorted({path.relative_to(config.output_dir).parts[0] for path in there})
    target = config.output_dir / PREVIOUS / "DATE"
    note = f"--fresh sets {', '.join(names)} aside in {target}" if names else f"--fresh: {config.output_dir} is empty"
    return replace(standing, notes=(note, *standing.notes))


def take_directory(config: RunConfig, plan: RunPlan, fresh: Fresh) -> Standing:
    """Bring a run directory into order, set its results aside if that is asked for, and decide what the start does.

    Called by the process that holds the lock.

    Raises:
        ConfigError: the start is refused.
    """
    output = config.output_dir
    notes = [*fresh.notes, *resume_setting_aside(output, fresh.keeps)]
    notes += [f"{MODEL_FOLDER}/ has its name again: the run was killed while it was replaced"] * restore_model(output)
    if fresh.acts:
        require_inputs_elsewhere(config)
        notes += set_results_aside(output, fresh.keeps)
    notes += failure_of_last_start(output)
    standing = standing_of(config, plan)
    # That no step is taken needs a word; resuming has its own.
    what = [standing.words] * (standing.action is Action.COMPLETE)
    return replace(standing, notes=(*notes, *standing.notes, *what))


def set_results_aside(output: Path, keeps: Sequence[Path]) -> list[str]:
    """Rename everything in a run directory into `previous/DATE`, whose name no other folder has.

    A kill leaves every file in one of the two places, and a note of which folder it is; `resume_setting_aside`
    finishes the work.

    Returns:
        Notes on that.
    Raises:
        ConfigError: something cannot be renamed.
    """
    if not _to_move(output, keeps):
        return [f"--fresh: {output} holds nothing to set aside"]
    date = datetime.now(UTC).strftime(DATE_FORMAT)
    with _errors_refused(output):
        previous = output / PREVIOUS
        previous.mkdir(exist_ok=True)
        number = 1
        while (previous / (name := date if number == 1 else f"{date}-{number}")).exists():
            number += 1
        (previous / name).mkdir()
        write_bytes(output / UNFINISHED_MOVE, name.encode())
    return _move(output, previous / name, keeps)


def resume_setting_aside(output: Path, keeps: Sequence[Path]) -> list[str]:
    """Finish what a start with `--fresh` was killed in. Nothing has been written since.

    Returns:
        Notes on that.
    Raises:
        ConfigError: something cannot be renamed.
    """
    marker = output / UNFINISHED_MOVE
    try:
        name = marker.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return []
    target = output / PREVIOUS / Path(name).name
    notes = ["a start with --fresh was killed while it set results aside; the rest follows"]
    with _errors_refused(output):
        target.mkdir(exist_ok=True)
    return [*notes, *_move(output, target, keeps)]


def restore_model(output: Path) -> bool:
    """Give the final model its name back if a run was killed while it put a new one in the place of an old one.

    Returns:
        Whether that was the case.
    """
    model = output / MODEL_FOLDER
    if os.path.lexists(model):
        return False
    whole = [(_step_of(path), path) for path in hidden_siblings(model) if is_whole_model(path)]
    if whole:
        max(whole)[1].rename(model)
        sync_directory(output)
    return bool(whole)


def _step_of(model: Path) -> int:
    try:
        record = RunRecord.read(model / RECORD_NAME)
    except InputProblems:
        return -1
    return -1 if record is None or record.step is None else record.step


def _move(output: Path, target: Path, keeps: Sequence[Path]) -> list[str]:
    with _errors_refused(output):
        for path in _to_move(output, keeps):
            place = target / path.relative_to(output)
            place.parent.mkdir(exist_ok=True)
            path.rename(place)
            if place.parent != target:
                sync_directory(place.parent)
        sync_directory(target)
        sync_directory(output)
        (output / UNFINISHED_MOVE).unlink()
        sync_directory(output / PREVIOUS)
    return [f"what was in {output} is set aside in {target}"]


def _to_move(output: Path, keeps: Sequence[Path]) -> list[Path]:
    """What is set aside: every entry of a run directory; of a folder that holds something to keep, its other entries.

    What is set aside already, the lock and requests to this start stay.
    """
    opened = _open_files()
    own = (PREVIOUS, SAVE_NAME, STOP_NAME)

    def is_kept(path: Path) -> bool:
        return any(_covers(output / keep, path) for keep in keeps) or _identity(path) in opened

    found: list[Path] = []
    for path in _entries(output):
        name = path.name
        if name in own or name.startswith((LOCK_NAME, f".{LOCK_NAME}")) or is_kept(path):
            continue
        is_folder = path.is_dir() and not path.is_symlink()
        inner = _entries(path) if is_folder else []
        stay = [item for item in inner if is_kept(item)]
        found += [item for item in inner if item not in stay] if stay else [path]
    return found


def _covers(keep: Path, path: Path) -> bool:
    """Whether a path is to stay: it is named, or begins with a name that ends in a hyphen."""
    if keep.name.endswith("-"):
        return path.parent == keep.parent and path.name.startswith(keep.name)
    return os.path.realpath(keep) == os.path.realpath(path) or _is_inside(keep, path)


def _open_files() -> set[tuple[int, int]]:
    """Device and inode of what this process reads from and prints to."""
    found = set()
    for descriptor in (0, 1, 2):
        try:
            status = os.fstat(descriptor)
        except OSError:
            continue
        found.add((status.st_dev, status.st_ino))
    return found


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_inside(path: Path, directory: Path) -> bool:
    """Whether a path lies in a directory, and not among what is set aside there already."""
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(directory))
    return real.is_relative_to(root) and not real.is_relative_to(root / PREVIOUS)


@contextmanager
def _errors_refused(output: Path) -> Iterator[None]:
    """Turn an error of the file system into a refusal."""
    try:
        yield
    except OSError as error:
        found = f"{error.filename or output}, which cannot be set aside ({error.strerror})"
        raise ConfigError([Problem("--fresh", "output_dir", found, "a directory that can be written")]) from None
