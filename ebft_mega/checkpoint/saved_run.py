"""Read a checkpoint's small files (state, configuration, architecture), compared with its manifest; no tensors."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.checkpoint.commit import step_of
from ebft_mega.checkpoint.manifest import MANIFEST_NAME, Manifest, parse_manifest, read_listed, read_manifest_bytes
from ebft_mega.checkpoint.run_state import STATE_NAME, RunState
from ebft_mega.config.schema import SECTIONS
from ebft_mega.config.yaml_source import MAX_WRITTEN_VALUES, read_yaml
from ebft_mega.errors import BrokenCheckpointError, Problem
from ebft_mega.io.json_text import parse_json
from ebft_mega.io.parse_boundary import reading
from ebft_mega.runtime.run_files import RESOLVED_CONFIG_NAME

MODEL_NAME = "config.json"

T = TypeVar("T")


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint whose manifest is whole, with its small files as they were written; the tensors are unread."""

    directory: Path
    manifest: Manifest
    manifest_sha256: str  # of the file; identifies the checkpoint
    state: RunState
    config: dict[str, Any]  # what `config.resolved.yaml` holds
    architecture: Architecture


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


def _read_config(content: bytes, where: str) -> dict[str, Any]:
    expected = "the configuration of a run: sections of keys, as YAML"
    with reading(where, "(text)", expected, BrokenCheckpointError):
        source = read_yaml(content.decode(), where, MAX_WRITTEN_VALUES)
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
    with reading(where, "(text)", "JSON", BrokenCheckpointError):
        fields = parse_json(content.decode())
    if not isinstance(fields, dict):
        raise BrokenCheckpointError([Problem(where, "(text)", repr(fields)[:200], "a JSON object")])
    return Architecture.from_hf(fields, where)
