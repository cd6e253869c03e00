"""Committing a checkpoint, which is one rename of its folder; finding committed ones, and cleaning up after kills.

A checkpoint is written in `step-XXXXXXXX.tmp` and is committed when that folder is renamed to `step-XXXXXXXX`
(`publish`). A kill between any two operations leaves every committed checkpoint under its name, or in a place from
which `restore_replaced` puts it back. Whether the files in a committed folder are still those that were written is
decided by `manifest.py`.
"""

import logging
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from ebft_mega.io.durable import flush_to_disk, sync_directory, write_bytes

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
LATEST = "latest"
_STEP = re.compile(r"step-([0-9]{8,18})")
# Being written; moved aside for a new one of the same step; being deleted.
_LEFTOVER = re.compile(r"step-[0-9]{8,18}(\.replaced|\.expired(-[0-9]+)?)?\.tmp")
_REPLACED = ".replaced.tmp"
_LONGEST_NAME = 100  # bytes that `latest` may hold


def folder_name(step: int) -> str:
    """Name of the checkpoint after so many optimizer steps."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """Optimizer steps done at a checkpoint of exactly this name; None if it is no such name."""
    match = _STEP.fullmatch(name)
    step = int(match[1]) if match else -1
    return step if match and folder_name(step) == name else None


def temporary_folder(root: Path, step: int) -> Path:
    """Where a checkpoint is written until it is committed; the folder is not made here."""
    return root / f"{folder_name(step)}.tmp"


def complete_folders(root: Path) -> list[Path]:
    """Committed checkpoints, going by their names, the one with the most steps first. Their files are not looked at.

    Links and files of such names are passed over.

    Raises:
        OSError: `root` is there and cannot be listed. (That it is not there means that there are no checkpoints.)
    """
    entries = _entries(root)
    steps = [step for entry in entries if (step := step_of(entry.name)) is not None and _is_folder(entry)]
    return [root / folder_name(step) for step in sorted(steps, reverse=True)]


def pointed_at(root: Path) -> str | None:
    """The name that the file `latest` holds, if it is one that a checkpoint can have."""
    try:
        with (root / LATEST).open("rb") as file:
            name = file.read(_LONGEST_NAME).decode("ascii", errors="replace").strip()
    except OSError:
        return None
    return name if step_of(name) is not None else None


def newest(root: Path) -> str | None:
    """Name of the newest checkpoint: what `latest` says if that folder is there, else the one with the most steps."""
    names = [folder.name for folder in complete_folders(root)]
    name = pointed_at(root)
    return name if name in names else next(iter(names), None)


def publish(temporary: Path, root: Path) -> Path:
    """Commit a checkpoint: give its folder the final name, durably when this returns.

    A folder that has the name already is one that was skipped when the run began, or an earlier one of the same step;
    it is moved aside and removed afterwards. If the run is killed in between, `restore_replaced` puts it back.

    Args:
        temporary: `temporary_folder` of a step. The files in its sub-folders have been synced by those who wrote them;
            its own files are synced here, and so are all names.
    Raises:
        OSError: it could not be done; the old folder has its name again.
    """
    final = root / temporary.name.removesuffix(".tmp")
    assert step_of(final.name) is not None, f"{temporary} is no temporary folder of a checkpoint"
    for parent, _, files in os.walk(temporary):
        for name in files if Path(parent) == temporary else ():
            flush_to_disk(temporary / name)
        sync_directory(Path(parent))
    sync_directory(root.parent)  # for the root's own name, the first time
    replaced = root / f"{final.name}{_REPLACED}"
    is_taken = os.path.lexists(final)
    if is_taken:
        _log(discard(replaced))
        final.rename(replaced)
    try:
        temporary.rename(final)
    except OSError:
        if is_taken:
            replaced.rename(final)
        raise
    sync_directory(root)
    _log(discard(replaced))
    return final


def point_latest(root: Path, name: str) -> None:
    """Write a checkpoint's name to the file `latest`; a reader sees the old name or the new one."""
    write_bytes(root / LATEST, f"{name}\n".encode())


def leftovers(root: Path) -> list[Path]:
    """Unfinished folders and files that killed runs have left, sorted. No reader takes them for a checkpoint."""
    half_written = f".{LATEST}.tmp"
    names = [entry.name for entry in _entries(root)]
    return sorted(root / name for name in names if _LEFTOVER.fullmatch(name) or name == half_written)


def restore_replaced(root: Path) -> list[str]:
    """Undo the first half of a replacement: give checkpoints that `publish` had moved aside their names back.

    Call it before the folders are looked at.

    Returns:
        Names of the checkpoints that are there again.
    Raises:
        OSError: one could not be renamed, and would not be found.
    """
    found = []
    for path, name in _stepped_aside(root).items():
        path.rename(root / name)
        found.append(name)
    if found:
        sync_directory(root)
    return found


def remove_leftovers(root: Path) -> list[str]:
    """Delete the unfinished folders of killed runs, except those that `restore_replaced` would bring back.

    Returns:
        Names of what was deleted. What could not be deleted is logged, and nothing is raised for it.
    """
    removed = []
    kept = _stepped_aside(root)
    for path in leftovers(root):
        if path in kept:
            continue
        warnings = discard(path)
        _log(warnings)
        removed += [path.name] * (not warnings)
    return removed


def set_aside(root: Path, steps: Iterable[int], reason: str = "abandoned") -> list[str]:
    """Keep a run from resuming from checkpoints, without deleting them: `step-X` becomes `step-X.abandoned`.

    `latest` afterwards names the newest one that is left, or is gone.

    Args:
        reason: the word behind the step.
    Returns:
        The new names, with a number where the first choice was taken.
    Raises:
        OSError: one could not be renamed. The run must not continue then: the next start would resume from it.
    """
    renamed = []
    for step in sorted(steps):
        folder = root / folder_name(step)
        if not os.path.lexists(folder):
            continue
        target = _free_name(root, f"{folder.name}.{reason}")
        folder.rename(target)
        renamed.append(target.name)
    if renamed:
        sync_directory(root)
        _point_at_what_is_left(root)
    return renamed


def discard(path: Path) -> list[str]:
    """Delete a checkpoint's folder, or a file or link in its place.

    It is first renamed to a name that no reader takes for a checkpoint, so that a kill leaves no partial checkpoint.

    Returns:
        Why it could not be deleted, in words; nothing is raised for it.
    """
    try:
        if step_of(path.name) is not None:
            aside = _free_name(path.parent, f"{path.name}.expired", ".tmp")
            path.rename(aside)
            sync_directory(path.parent)
            path = aside
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        return [f"{path} could not be removed: {error.strerror or error}"]
    return []


def _stepped_aside(root: Path) -> dict[Path, str]:
    """Folders that `publish` has moved aside and whose replacement is missing, with the names that they had."""
    found = {path: path.name.removesuffix(_REPLACED) for path in leftovers(root) if path.name.endswith(_REPLACED)}
    return {path: name for path, name in found.items() if not os.path.lexists(root / name)}


def _point_at_what_is_left(root: Path) -> None:
    left = [folder.name for folder in complete_folders(root)]
    if pointed_at(root) in left:
        return
    if left:
        point_latest(root, left[0])
    else:
        (root / LATEST).unlink(missing_ok=True)
        sync_directory(root)


def _free_name(root: Path, stem: str, suffix: str = "") -> Path:
    """An unused name: the stem, or the stem with a number."""
    number, path = 1, root / f"{stem}{suffix}"
    while os.path.lexists(path):
        number += 1
        path = root / f"{stem}-{number}{suffix}"
    return path


def _entries(root: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(root) as found:
            return list(found)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:  # gone between the listing and this look, on a network file system
        return False


def _log(warnings: list[str]) -> None:
    for warning in warnings:
        logger.warning("%s", warning)
