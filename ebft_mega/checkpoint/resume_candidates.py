"""Decide which checkpoints a run may resume from, and in which order they are tried, from `checkpoint.resume`."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from ebft_mega.checkpoint.commit import CHECKPOINTS, complete_folders, newest, pointed_at, step_of
from ebft_mega.checkpoint.manifest import MANIFEST_NAME, read_listed, read_manifest, read_manifest_bytes
from ebft_mega.checkpoint.run_state import STATE_NAME, RunState, StartedFrom
from ebft_mega.checkpoint.saved_run import SavedRun
from ebft_mega.config.schema import RunConfig
from ebft_mega.errors import BrokenCheckpointError, ConfigError, InputProblems, Problem


@dataclass(frozen=True)
class Candidates:
    """The checkpoints that a run may resume from."""

    paths: tuple[Path, ...]  # in the order in which they are tried
    is_explicit: bool  # `checkpoint.resume` names a path: the run must not start over instead
    abandoned: tuple[int, ...] = ()  # steps in `output_dir` to set aside once a choice is made
    notes: tuple[str, ...] = ()
    named: Path | None = None  # the checkpoint that the path means, if it is one and is there


def candidates(config: RunConfig) -> Candidates:
    """List the checkpoints that a run may resume from. Reads names, and with an explicit path small files.

    `never`: none; every checkpoint in `output_dir` is abandoned.

    `auto`: the checkpoints in `output_dir`, the one with the most steps first, whatever `latest` says: one that is
    newer than `latest` was committed just before a run was killed.

    A path to a checkpoint: that one. To another run's directory, or its folder of checkpoints: its newest one. To
    `output_dir`: as with `auto`. If `output_dir` holds checkpoints of a run that began at that path, those come first,
    the newest one foremost, so that a requeued job continues instead of starting over. They are recognised by the hash
    of the checkpoint's manifest; by its path only where the checkpoint is gone or the path names a run that may have
    continued. All other checkpoints in `output_dir` are abandoned, except the named one itself and those before it.

    Raises:
        ConfigError: there is no checkpoint at the path, and none that began there.
        OSError: `output_dir` cannot be read.
    """
    root = config.output_dir / CHECKPOINTS
    own = complete_folders(root)
    if config.checkpoint.resume == "never":
        note = (
            f"checkpoint.resume is never: the run begins anew beside {len(own)} checkpoints, also when it is requeued"
        )
        return Candidates((), is_explicit=False, abandoned=_steps(own), notes=(note,) * bool(own))
    if config.checkpoint.resume == "auto":
        return Candidates(tuple(own), is_explicit=False, notes=_notes_on_latest(root, own))
    given = Path(config.checkpoint.resume)
    if own and _real(given) in (_real(config.output_dir), _real(root)):
        return Candidates(tuple(own), is_explicit=True, notes=_notes_on_latest(root, own))
    named = _named_checkpoint(given)
    may_have_moved_on = named is None or named != _real(given)
    place = _real(given) if may_have_moved_on else None
    is_own = named is not None and named.parent == _real(root)
    if named is not None and is_own:
        named = root / named.name  # as the others there
    checksum = _manifest_checksum(named) if named is not None else None
    descendants = [folder for folder in own if _began_at(folder, checksum, place)]
    if named is None and not descendants:
        key = "checkpoint.resume"
        expected = "a checkpoint (a complete folder step-XXXXXXXX), or a run directory or folder `checkpoints` with one"
        raise ConfigError([Problem(config.place(key), key, f"{given}, where there is none", expected)])
    kept = {folder.name for folder in descendants}
    if named is not None and is_own:
        kept |= {folder.name for folder in own if _step(folder) <= _step(named)}
    began = f"this run began at {given} (checkpoint.resume) and has saved checkpoints since"
    return Candidates(
        paths=(*descendants, *([named] if named is not None else [])),
        is_explicit=True,
        abandoned=_steps([folder for folder in own if folder.name not in kept]),
        notes=(began,) * bool(descendants),
        named=named,
    )


def named_origin(config: RunConfig, found: Candidates) -> StartedFrom | None:
    """Name the checkpoint that a run begins from, if `checkpoint.resume` names one outside its directory."""
    if found.named is None or found.named.parent == config.output_dir / CHECKPOINTS:
        return None
    checksum = _manifest_checksum(found.named)
    return None if checksum is None else StartedFrom(path=str(_real(found.named)), manifest_sha256=checksum)


def origin(saved: SavedRun, found: Candidates) -> StartedFrom | None:
    """The checkpoint that `checkpoint.resume` named when the resumed run first began; None: it named none.

    Args:
        saved: the candidate that was chosen.
    """
    if found.is_explicit and saved.directory == found.named:
        return StartedFrom(path=str(_real(saved.directory)), manifest_sha256=saved.manifest_sha256)
    return saved.state.started_from


def _step(folder: Path) -> int:
    step = step_of(folder.name)
    assert step is not None, f"{folder} is no checkpoint of a run directory"
    return step


def _steps(folders: list[Path]) -> tuple[int, ...]:
    return tuple(sorted(map(_step, folders)))


def _real(path: Path) -> Path:
    """A path without links in it, whether there is something or not."""
    return Path(os.path.realpath(path))


def _notes_on_latest(root: Path, own: list[Path]) -> tuple[str, ...]:
    """A note where `latest` is not the checkpoint that is tried first."""
    name = pointed_at(root)
    if name is None or (own and name == own[0].name):
        return ()
    if name not in [folder.name for folder in own]:
        return (f"{root / 'latest'} names {name}, which is not there",)
    return (f"{root / 'latest'} names {name}; {own[0].name} is newer",)


def _named_checkpoint(given: Path) -> Path | None:
    """The checkpoint folder that a path means, without links in its path; None if there is none."""
    if not os.path.isdir(given) or given.name.endswith(".tmp"):  # such a folder was never committed
        return None
    if step_of(given.name) is not None or os.path.lexists(given / MANIFEST_NAME):
        return _real(given)
    root = given / CHECKPOINTS if os.path.isdir(given / CHECKPOINTS) else given
    name = newest(root)
    return _real(root / name) if name is not None else None


def _manifest_checksum(folder: Path) -> str | None:
    try:
        return hashlib.sha256(read_manifest_bytes(folder)).hexdigest()
    except BrokenCheckpointError:
        return None  # no run can be recognised by it


def _began_at(folder: Path, checksum: str | None, place: Path | None) -> bool:
    """Whether a checkpoint is of a run that began at another one.

    Args:
        checksum: of the other one's manifest.
        place: its path, if checkpoints are to be recognised by it, too.
    """
    try:
        manifest = read_manifest(folder)
        state = RunState.from_json(read_listed(folder, manifest, STATE_NAME), str(folder / STATE_NAME))
    except InputProblems:
        return False
    began = state.started_from
    if began is None:
        return False
    return began.manifest_sha256 == checksum or (place is not None and Path(began.path).is_relative_to(place))
