"""Check a model directory, the same way for every model of a run and of every tool: no torch, weights are not read.

Only tensors that would be left out are compared with what stands in for them.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebft_mega.architecture.hf_config import Architecture, tapped_layers
from ebft_mega.architecture.supported_configs import code_keys
from ebft_mega.architecture.tensor_shapes import hf_shapes
from ebft_mega.checkpoint.commit import CHECKPOINTS
from ebft_mega.checkpoint.model_folder import is_checkpoint, open_model_folder
from ebft_mega.checkpoint.tensor_index import TensorIndex
from ebft_mega.data.selection.text_formats import kind_of_file
from ebft_mega.data.text.file_kinds import JSON_LINES
from ebft_mega.data.tokenizers.tokenizer_files import read_tokenizer_file
from ebft_mega.data.tokenizers.tokenizer_kinds import SENTENCEPIECE_NAME
from ebft_mega.errors import InputError, InputProblems, Problem
from ebft_mega.io.contained_files import leaves, read_contained_json
from ebft_mega.io.input_errors import file_obstacle
from ebft_mega.model.weights.tensor_fit import check_fit, with_own_head
from ebft_mega.model.weights.weight_files import stored_tensors
from ebft_mega.runtime.run_files import MODEL_FOLDER

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
# JSON files beside config.json that say how a model is used.
DESCRIBING_NAMES = (
    GENERATION_CONFIG_NAME,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json"),
)
_ADAPTER_NAME = "adapter_config.json"
_DIRECTORY = "a Hugging Face model directory"
_OF_A_RUN = (MODEL_FOLDER, CHECKPOINTS)
_SHOWN_LINKS = 3


@dataclass(frozen=True)
class CheckedModel:
    """A model that can be computed as it is, as far as that is seen without reading its weights."""

    directory: Path | None  # None: its weights are random
    architecture: Architecture  # as the files have it: untied where they hold another head
    end_tokens: tuple[int, ...]  # ids that its configuration names as ends of a text
    notes: tuple[str, ...]


def random_model(config: dict[str, Any], place: str) -> CheckedModel:
    """Check the configuration of a model with random weights.

    Args:
        place: where it stands, for messages.
    Raises:
        InputError: everything that is wrong with it, at once.
    """
    architecture = Architecture.from_hf(config, place)
    return CheckedModel(None, architecture, _end_tokens(config), architecture.notes)


def check_model(
    directory: Path, feature_layers: tuple[float, ...] | None = None, *, has_weights: bool = True
) -> CheckedModel:
    """Check configuration, tensors and describing files of a model directory.

    Tensors are compared with the configuration by name, shape and dtype. Of a checkpoint the small files are compared
    with its manifest, too.

    Args:
        directory: a Hugging Face model directory, or a checkpoint folder of this trainer.
        feature_layers: relative depths at which a feature network reads the model: no layer above and no head is
            needed; None: the whole model.
        has_weights: false where a plan is made before there are any: only the other files are checked.
    Raises:
        InputError, BrokenCheckpointError: everything that is wrong with it, at once.
    """
    if (obstacle := directory_obstacle(directory)) is not None:
        raise InputError([Problem(str(directory), directory.name, obstacle, _DIRECTORY)])
    if not os.path.lexists(directory / CONFIG_NAME) and any((directory / name).is_dir() for name in _OF_A_RUN):
        expected = f"its final model, {directory / MODEL_FOLDER}, or one of its {CHECKPOINTS}"
        raise InputError([Problem(str(directory), directory.name, "the directory of a run", expected)])
    # Of a checkpoint nothing is parsed before it has been compared with the manifest.
    index = open_model_folder(directory, hash_weights=False).index if is_checkpoint(directory) else None
    problems: list[Problem] = []
    architecture, notes = None, list[str]()
    try:
        architecture = Architecture.from_directory(directory)
    except InputProblems as error:
        problems += error.problems
    try:
        if index is None and has_weights:
            architecture, found, notes = _with_tensors(directory, architecture, feature_layers)
            problems += found
        elif index is not None and architecture is not None:
            problems += _checkpoint_problems(directory, architecture, index)
    except OSError as error:
        found_text = f"{error.filename or directory}: {error.strerror or error}"
        problems.append(Problem(str(directory), "weights", found_text, "files that can be read"))
    described, more = _described(directory)
    problems += more
    if problems or architecture is None:
        raise InputError(problems)
    end_tokens = _end_tokens(architecture.hf_config, described.get(GENERATION_CONFIG_NAME, {}))
    return CheckedModel(directory, architecture, end_tokens, (*architecture.notes, *notes))


def directory_obstacle(path: Path) -> str | None:
    """Why a path is no directory that can be read, in words; None if it is one."""
    try:
        if path.is_dir():
            next(iter(path.iterdir()), None)
            return None
    except OSError as error:
        return error.strerror or str(error)
    obstacle = file_obstacle(path)
    kind = kind_of_file(path)
    words = "a file" if kind is None or kind is JSON_LINES else kind.words  # JSON may be one of the directory's files
    return f"no directory {path}" if obstacle == "no such file" else obstacle or words


def _checkpoint_problems(directory: Path, architecture: Architecture, index: TensorIndex) -> list[Problem]:
    """Tensors of a checkpoint folder that are not those of its configuration."""
    stored, needed = index.kinds.get("weights", {}), hf_shapes(architecture)
    problems = []
    for name in dict.fromkeys((*needed, *stored)):
        found = f"shape {tuple(stored[name].shape)}" if name in stored else "no such tensor"
        expected = f"shape {needed[name]}" if name in needed else "none of this name"
        if found != expected:
            problems.append(Problem(str(directory), f"weights: {name}", found, expected))
    return problems


def _with_tensors(
    directory: Path, architecture: Architecture | None, feature_layers: tuple[float, ...] | None
) -> tuple[Architecture | None, list[Problem], list[str]]:
    """The architecture as the tensors of a directory have it, what is wrong with them, and notes."""
    stored, problems = stored_tensors(directory)
    if architecture is None or problems:
        return architecture, problems, []
    architecture, head_notes = with_own_head(architecture, stored)
    depth = None if feature_layers is None else tapped_layers(feature_layers, architecture.num_hidden_layers)[-1]
    fit = check_fit(directory, stored, architecture, depth)
    files = {tensor.file.name for tensor in stored.values()}
    unread = sorted(path.name for path in directory.glob("*.safetensors") if path.name not in files)
    unread_notes = [f"not read, because no index names them: {', '.join(unread)}."] * bool(unread)
    adapter_notes = [f"{_ADAPTER_NAME} is not read: an adapter counts only once it is merged into the weights."]
    adapter_notes *= file_obstacle(directory / _ADAPTER_NAME) is None
    model_notes = [*_link_notes(directory, files), *head_notes, *fit.notes]
    return architecture, list(fit.problems), [*model_notes, *unread_notes, *adapter_notes]


def _link_notes(directory: Path, files: Iterable[str]) -> list[str]:
    """Say which files of weights lie elsewhere: they are read, and what is trained from them is published."""
    targets = {name: leaves(directory, directory / name) for name in sorted(files)}
    words = [f"{name} -> {target}" for name, target in targets.items() if target is not None]
    more = [f"and {len(words) - _SHOWN_LINKS} more"] * (len(words) > _SHOWN_LINKS)
    shown = ", ".join(words[:_SHOWN_LINKS] + more)
    return [f"weights are read through links that leave {directory}: {shown}."] * bool(words)


def _described(directory: Path) -> tuple[dict[str, dict[str, Any]], list[Problem]]:
    """The JSON files beside `config.json`; problems of those that are no JSON object or name code to run.

    What a run reads of a model must be in its directory; of a `tokenizer.model` no more is looked at here.
    """
    described: dict[str, dict[str, Any]] = {}
    problems: list[Problem] = []
    if os.path.lexists(directory / SENTENCEPIECE_NAME):
        try:
            read_tokenizer_file(directory, SENTENCEPIECE_NAME)
        except InputError as error:
            problems += error.problems
    for name in DESCRIBING_NAMES:
        path = directory / name
        if not os.path.lexists(path):
            continue
        try:
            described[name] = read_contained_json(directory, name, "JSON")
        except InputError as error:
            problems += error.problems
            continue
        expected = "no such key: code named by a model directory is never run"
        problems += [
            Problem(str(path), key, json.dumps(value)[:100], expected) for key, value in code_keys(described[name])
        ]
    return described, problems


def _end_tokens(*configs: dict[str, Any]) -> tuple[int, ...]:
    """The ids that configurations name as ends of a text."""
    found: list[int] = []
    for config in configs:
        named = config.get("eos_token_id")
        found += [token for token in (named if isinstance(named, list) else [named]) if type(token) is int]
    return tuple(dict.fromkeys(found))
