"""Which checkpoint a run goes on from, what it says, and what may have changed since it was written."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic_core import PydanticUndefined, to_jsonable_python

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.checkpoint.commit import CHECKPOINTS, complete_folders, newest, pointed_at, step_of
from ebft_mega.checkpoint.manifest import (
    MANIFEST_NAME,
    Manifest,
    parse_manifest,
    read_listed,
    read_manifest,
    read_manifest_bytes,
)
from ebft_mega.checkpoint.run_state import STATE_NAME, RunState, StartedFrom
from ebft_mega.config.fields import yaml_text
from ebft_mega.config.schema import SECTIONS, EbftConfig, RunConfig, all_keys
from ebft_mega.config.yaml_source import read_yaml
from ebft_mega.errors import BrokenCheckpointError, ConfigError, InputProblems, Problem
from ebft_mega.runtime.run_files import RESOLVED_CONFIG_NAME

MODEL_NAME = "config.json"

# Keys whose change would make another run of it.
REFUSED = (
    "seed",
    "data.document_masking",
    *(f"ebft.{name}" for name in EbftConfig.model_fields if name != "feature_model"),
)
# Keys that may change, with what follows from it.
_OTHER_STEPS = "the steps from here on are not those of an uninterrupted run"
_OTHER_ROWS = "held-out figures from here on may be of other rows than those before"
NOTED = {
    "train.global_batch_size": "a step reads another number of rows from here on",
    "train.lr": _OTHER_STEPS,
    "train.lr_scheduler": _OTHER_STEPS,
    "train.warmup_steps": _OTHER_STEPS,
    "train.weight_decay": _OTHER_STEPS,
    "train.betas": _OTHER_STEPS,
    "train.grad_clip": _OTHER_STEPS,
    "train.dtype": _OTHER_STEPS,
    "evaluation.shards": _OTHER_ROWS,
    "evaluation.rows": _OTHER_ROWS,
    "evaluation.interval": "evaluations come at other steps",
}
# Noted where the learning rate depends on the last step; else the run is only longer or shorter.
LENGTH = ("train.max_steps", "train.max_tokens")
# Compared by contents, not by where they lie: the architecture below, the weights of the feature network by their
# hash, the data by its state (`StreamState`).
COMPARED_ELSEWHERE = (
    "model.init_from",
    "model.config",
    "ebft.feature_model",
    "data.shards",
    "data.sources",
    "data.sequence_length",
    "data.tokenizer",
)
# How and where the same run is done.
FREE = (
    "output_dir",
    "data.on_error",
    "data.allow_changed",
    "data.max_skipped_rows",
    "data.max_skipped_share",
    "data.workers",
    "data.cache",
    "data.cache_gigabytes",
    "train.micro_batch_size",
    "train.max_run_minutes",
    "train.step_timeout_minutes",
    "train.activation_checkpointing",
    "train.attention",
)
FREE_SECTIONS = ("parallel", "zero", "learn", "checkpoint", "profile")


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint whose manifest is whole, with its small files as they were written; the tensors are unread."""

    directory: Path
    manifest: Manifest
    manifest_sha256: str  # of the file; identifies the checkpoint
    state: RunState
    config: dict[str, Any]  # what `config.resolved.yaml` holds
    architecture: Architecture


@dataclass(frozen=True)
class Candidates:
    """Where a run could go on from."""

    paths: tuple[Path, ...]  # to be tried in this order
    is_explicit: bool  # `checkpoint.resume` names a path: to begin anew instead is out of the question
    abandoned: tuple[int, ...] = ()  # steps in `output_dir` to set aside once a choice is made
    notes: tuple[str, ...] = ()
    named: Path | None = None  # the checkpoint that the path means, if it is one and is there


T = TypeVar("T")


def read_run(directory: Path) -> SavedRun:
    """Read the small files of a checkpoint, each only if it is what the manifest says.

    Raises:
        BrokenCheckpointError: the manifest is not whole, or a file is missing or another one; all problems at once.
        InputError: a newer version of this program has written it, or its model is of a kind that is not known here.
    """
    text = read_manifest_bytes(directory)
    manifest = parse_manifest(directory, text)
    problems: list[Problem] = []

    def attempt(read: Callable[[bytes, str], T], name: str) -> T | None:
        try:
            return read(read_listed(directory, manifest, name), str(directory / name))
        except BrokenCheckpointError as error:
            problems.extend(error.problems)
            return None

    state = attempt(RunState.from_json, STATE_NAME)
    config = attempt(_read_config, RESOLVED_CONFIG_NAME)
    architecture = attempt(_read_architecture, MODEL_NAME)
    where = str(directory / MANIFEST_NAME)
    if state is not None and state.step != manifest.step:
        problems.append(Problem(where, "step", str(manifest.step), f"{state.step}, as in {STATE_NAME}"))
    if step_of(directory.name) not in (None, manifest.step):
        problems.append(Problem(where, "step", str(manifest.step), f"that of the folder's name, {directory.name}"))
    if problems:
        raise BrokenCheckpointError(problems)
    assert state is not None and config is not None and architecture is not None, "otherwise there are problems"
    return SavedRun(directory, manifest, hashlib.sha256(text).hexdigest(), state, config, architecture)


def candidates(config: RunConfig) -> Candidates:
    """Where a run of this configuration could go on from. Reads names, and with an explicit path small files.

    `never`: nowhere; every checkpoint in `output_dir` is abandoned.

    `auto`: from the checkpoints in `output_dir`, the one with the most steps first, whatever `latest` says: one that
    is newer than `latest` came to count just before a run was killed.

    A path: from that checkpoint; of another run's directory or its folder of checkpoints, the newest one; of its own
    directory, as with `auto`. If `output_dir` holds checkpoints of a run that began there, those come first, the newest
    one foremost: so a job that is queued again goes on instead of beginning anew. They are known by the checkpoint's
    hash; by its place only where that is gone or the path names a run that may have gone on. Whatever else lies in
    `output_dir` is abandoned, but for the checkpoint itself and those before it.

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


def described_start(config: RunConfig) -> str:
    """Where a run of this configuration would go on from, for people; whether it is whole is not looked at.

    Raises:
        ConfigError: see `candidates`.
    """
    found = candidates(config)
    if not found.paths:
        return "The run begins at its first step."
    older = ", or from an older one if that is not whole" if len(found.paths) > 1 else ""
    return f"The run goes on from {found.paths[0]}{older}."


def origin(saved: SavedRun, found: Candidates) -> StartedFrom | None:
    """The checkpoint that `checkpoint.resume` named when the run began that now goes on; None: it never named one.

    Args:
        saved: the candidate that was chosen.
    """
    if found.is_explicit and saved.directory == found.named:
        return StartedFrom(path=str(_real(saved.directory)), manifest_sha256=saved.manifest_sha256)
    return saved.state.started_from


def refused_changes(saved: SavedRun, config: RunConfig, architecture: Architecture) -> list[Problem]:
    """What has changed so that the checkpoint cannot be gone on from, each with its old and new value.

    The data and the feature network are compared elsewhere, by their contents.

    Args:
        config: of the run that is about to go on.
        architecture: of its model.
    """
    advice = f"in {saved.directory}; a new run from its weights is `model.init_from: {saved.directory}`"
    problems = []
    for key, old, new in _changed_values(saved, config):
        if key in REFUSED:
            problems.append(Problem(config.place(key), key, _shown(new), f"{_shown(old)}, as {advice}"))
    model_key = "model.init_from" if config.model.config is None else "model.config"
    then, now = _sizes(saved.architecture), _sizes(architecture)
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            old, new = _shown(then.get(name)), _shown(now.get(name))
            problems.append(Problem(config.place(model_key), f"{model_key}: {name}", new, f"{old}, as {advice}"))
    return problems


def noted_changes(saved: SavedRun, config: RunConfig) -> list[str]:
    """What has changed in the configuration and lets the run go on otherwise than if it had never stopped."""
    notes = [
        f"{key} was {_shown(old)} and is {_shown(new)} now: {NOTED[key]}"
        for key, old, new in _changed_values(saved, config)
        if key in NOTED
    ]
    old_steps = _total_steps(saved.config)
    if config.train.lr_scheduler != "constant" and old_steps not in (None, config.total_steps):
        names = " or ".join(LENGTH)
        notes.append(f"the run had {old_steps} steps and has {config.total_steps} now ({names}): {_OTHER_STEPS}")
    return notes


def _read_config(content: bytes, where: str) -> dict[str, Any]:
    expected = "the configuration of a run: sections of keys, as YAML"
    try:
        source = read_yaml(content.decode(), where)
    except (UnicodeDecodeError, RecursionError) as error:
        raise BrokenCheckpointError([Problem(where, "(text)", str(error), expected)]) from None
    problems = list(source.problems)
    tree = source.value
    if not isinstance(tree, dict):
        problems = problems or [Problem(where, "(text)", repr(tree)[:200], expected)]
    else:
        wrong = [name for name in SECTIONS if not isinstance(tree.get(name, {}), dict)]
        problems += [Problem(where, name, repr(tree[name])[:200], "a section") for name in wrong]
    if problems:
        raise BrokenCheckpointError(problems)
    return dict(tree)


def _read_architecture(content: bytes, where: str) -> Architecture:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BrokenCheckpointError([Problem(where, "(text)", str(error), "JSON")]) from None
    if not isinstance(fields, dict):
        raise BrokenCheckpointError([Problem(where, "(text)", repr(fields)[:200], "a JSON object")])
    return Architecture.from_hf(fields, where)


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
    """A word where `latest` is not the one that is tried first."""
    name = pointed_at(root)
    if name is None or (own and name == own[0].name):
        return ()
    if name not in [folder.name for folder in own]:
        return (f"{root / 'latest'} names {name}, which is not there",)
    return (f"{root / 'latest'} names {name}; {own[0].name} is newer",)


def _named_checkpoint(given: Path) -> Path | None:
    """The checkpoint folder that a path means, without links in its path; None if there is none."""
    if not os.path.isdir(given) or given.name.endswith(".tmp"):  # such a folder never came to count
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
        return None  # nothing can be known to have begun there


def _began_at(folder: Path, checksum: str | None, place: Path | None) -> bool:
    """Whether a checkpoint is of a run that began at another one.

    Args:
        checksum: of the other one's manifest.
        place: where it lies or lay, if that is to count too.
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


def _changed_values(saved: SavedRun, config: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """Key, old and new value of every key that differs; a key that the checkpoint does not know had its default."""
    now = config.model_dump(mode="json")
    for key, field in all_keys().items():
        section, _, leaf = key.rpartition(".")
        default = field.get_default(call_default_factory=True)
        default = None if default is PydanticUndefined else to_jsonable_python(default)
        old = (saved.config.get(section, {}) if section else saved.config).get(leaf, default)
        new = (now[section] if section else now)[leaf]
        if old != new:
            yield key, old, new


def _total_steps(tree: dict[str, Any]) -> int | None:
    """Optimizer steps of the whole run by a saved configuration; None where it does not say."""
    train, data = tree.get("train", {}), tree.get("data", {})
    if train.get("max_steps") is not None:
        return int(train["max_steps"])
    try:
        return int(train["max_tokens"]) // (int(train["global_batch_size"]) * int(data["sequence_length"]))
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def _sizes(architecture: Architecture) -> dict[str, Any]:
    """What makes weights fit a model: its fields, and its rotary frequencies however a file spells them."""
    fields = {item.name: getattr(architecture, item.name) for item in dataclasses.fields(architecture)}
    hf_config = fields.pop("hf_config")
    rope = {**(hf_config.get("rope_scaling") or {}), **(hf_config.get("rope_parameters") or {})}
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", hf_config.get("rope_theta", 10000.0))
    return {**fields, **{name if name.startswith("rope_") else f"rope_{name}": value for name, value in rope.items()}}


def _shown(value: Any) -> str:
    return yaml_text(value) if not isinstance(value, list | dict) else json.dumps(value)
