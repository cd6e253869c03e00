"""The files that describe a model beside its weights: read from its directory, checked, carried along. No torch.

They come from a model directory that nobody vouches for, and go into checkpoints, the final model and exports. Nothing
in them is executed, and whatever a loader would stumble over stays behind and is named.
"""

import base64
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.supported_configs import CODE_KEYS, code_keys
from ebft_mega.checkpoint.manifest import MANIFEST_NAME, read_listed, read_manifest
from ebft_mega.checkpoint.model_folder import is_checkpoint
from ebft_mega.checkpoint.run_state import STATE_NAME
from ebft_mega.checkpoint.tensor_index import INDEX_NAME as TENSORS_NAME
from ebft_mega.config.load import resolved_yaml
from ebft_mega.config.schema import RunConfig
from ebft_mega.data.tokenizers.tokenizer import parse_definition
from ebft_mega.data.tokenizers.tokenizer_files import (
    LONGEST_BYTES,
    MEBIBYTE,
    NAMED_TEXTS,
    check_named_text,
    is_named,
    read_tokenizer_files,
)
from ebft_mega.errors import InputError, Problem
from ebft_mega.io.contained_files import leaves, read_contained_bytes
from ebft_mega.model.weights.weight_files import INDEX_NAME, SINGLE_NAME, stored_tensors
from ebft_mega.runtime.repeatability import describe_numerics
from ebft_mega.runtime.run_files import ENVIRONMENT_NAME, RESOLVED_CONFIG_NAME, describe_environment

CONFIG_NAME = "config.json"
TEMPLATES_FOLDER = "additional_chat_templates"
VOCABULARY_NAMES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
# Of a tokenizer: they mean something beside its vocabulary only.
TOKENIZER_NAMES = (
    *VOCABULARY_NAMES,
    *("merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
RUN_RECORD_NAME = "run.json"  # which run has made a final model; not what another one is made of
# This program's own; a file of such a name would be taken for it.
OWN_NAMES = (
    RUN_RECORD_NAME,
    CONFIG_NAME,
    MANIFEST_NAME,
    STATE_NAME,
    TENSORS_NAME,
    ENVIRONMENT_NAME,
    RESOLVED_CONFIG_NAME,
)
# They would make a loader look for other weights than those beside them.
MISLEADING_NAMES = ("adapter_config.json", "hf_quant_config.json", "quantize_config.json")
ALL_BYTES = 256 * MEBIBYTE
MOST_NAMES = 1000  # of a directory that are looked at
SHOWN_NAMES = 20
_NO_CODE = "no such key: code named by a model directory is never run"


@dataclass(frozen=True)
class DescribingFiles:
    """What describes a model, checked and in memory."""

    directory: Path
    contents: dict[str, bytes] = field(repr=False)  # by path relative to the directory, which has at most one `/`
    problems: tuple[Problem, ...]  # files that are not what they are named, left out; keys that name code, taken out
    others: tuple[str, ...]  # names that are left out, with the reason where it is not their kind

    @property
    def has_tokenizer(self) -> bool:
        """Whether a vocabulary is among them."""
        return any(name in self.contents for name in VOCABULARY_NAMES)

    @property
    def notes(self) -> list[str]:
        """One line about everything that is not copied, if anything is not."""
        words = [_left_out(problem) for problem in self.problems] + list(self.others)
        more = [f"and {len(words) - SHOWN_NAMES} more"] * (len(words) > SHOWN_NAMES)
        return [f"not copied from {self.directory}: {', '.join(words[:SHOWN_NAMES] + more)}"] * bool(words)


def read_describing_files(directory: Path) -> DescribingFiles:
    """Read everything that describes the model in a directory.

    Each file is checked to be what it is named (see `check_named_text`), and tokenizers are loaded; sizes are bounded
    by `LONGEST_BYTES` and `ALL_BYTES`. Links are followed within the directory, and in Hugging Face's cache to its
    blobs; what lies elsewhere is left out.

    Args:
        directory: a Hugging Face directory, or a checkpoint folder of this trainer, of which only files count that its
            manifest lists, and that are as it says.
    Raises:
        BrokenCheckpointError: a file of a checkpoint has changed since it was written.
    """
    found, others = _checkpoint_files(directory) if is_checkpoint(directory) else _plain_files(directory)
    contents: dict[str, bytes] = {}
    problems: list[Problem] = []
    total = 0
    for name, content in found:
        total += len(content)
        if total > ALL_BYTES:
            others.append(f"{name} (more than {ALL_BYTES // MEBIBYTE} MiB in all)")
            continue
        try:
            contents[name], named_code = _checked(name, content)
        except ValueError as error:
            if is_named(name):
                problems.append(Problem(str(directory / name), name, str(error), f"a {Path(name).suffix} file or none"))
            else:  # whatever programs leave beside a model: a trainer's log may say NaN
                others.append(f"{name} ({error})")
        else:
            problems += _code_problems(directory / name, named_code)
    return DescribingFiles(directory, contents, tuple(problems), tuple(others))


def describing_files(config: RunConfig, tokenizer_directory: Path) -> DescribingFiles:
    """What describes the model that a run trains: the files of the model that it starts from.

    Args:
        tokenizer_directory: of the training data, for a model that has no tokenizer of its own.
    Raises:
        BrokenCheckpointError: the model is a checkpoint with a changed file.
        InputError: a file of the data's tokenizer is not what it is named, or lies elsewhere.
    """
    tokenizer = _describing_tokenizer(tokenizer_directory)
    if config.model.init_from is None:
        return tokenizer
    own = read_describing_files(config.model.init_from)
    if own.has_tokenizer:
        return own
    orphans = [name for name in own.contents if name in TOKENIZER_NAMES]
    others = (*own.others, *(f"{name} (there is no vocabulary beside it)" for name in orphans))
    contents = {name: content for name, content in own.contents.items() if name not in orphans}
    return DescribingFiles(
        own.directory, {**contents, **tokenizer.contents}, (*own.problems, *tokenizer.problems), others
    )


def _describing_tokenizer(directory: Path) -> DescribingFiles:
    """The whole tokenizer of a dataset.

    Raises:
        InputError: a file is not what it is named, or lies elsewhere.
    """
    contents: dict[str, bytes] = {}
    named_code: list[Problem] = []
    problems: list[Problem] = []
    for name, content in read_tokenizer_files(directory).items():
        try:
            contents[name], found = _checked(name, content)
        except ValueError as error:
            problems.append(Problem(str(directory / name), name, str(error), f"the {name} of a tokenizer"))
        else:
            named_code += _code_problems(directory / name, found)
    if problems:
        raise InputError(problems)
    return DescribingFiles(directory, contents, tuple(named_code), ())


def checkpoint_files(config: RunConfig, architecture: Architecture, described: DescribingFiles) -> dict[str, bytes]:
    """Contents by name of the files that make a checkpoint a model directory, and say what made it."""
    return {
        **described.contents,
        CONFIG_NAME: _as_json(architecture.exported_config("float32")),
        ENVIRONMENT_NAME: _as_json({**describe_environment(config.loaded_plugins), **describe_numerics()}),
        RESOLVED_CONFIG_NAME: resolved_yaml(config).encode(),
    }


def _checkpoint_files(directory: Path) -> tuple[Iterator[tuple[str, bytes]], list[str]]:
    """Names and contents of the small files of a checkpoint that are not its own."""
    manifest = read_manifest(directory)
    names = [name for name in manifest.files if name not in OWN_NAMES and _kind(name) is not None]
    return ((name, read_listed(directory, manifest, name)) for name in names), []


def _plain_files(directory: Path) -> tuple[Iterator[tuple[str, bytes]], list[str]]:
    """Names and contents of the files of a model directory that are of the known kinds; what else is there."""
    weights = {tensor.file.name for tensor in stored_tensors(directory)[0].values()}
    expected = {*weights, SINGLE_NAME, INDEX_NAME, CONFIG_NAME, RUN_RECORD_NAME}
    names, others = _names_in(directory)
    templates = directory / TEMPLATES_FOLDER
    if TEMPLATES_FOLDER in names and leaves(directory, templates) is None and templates.is_dir():
        names.remove(TEMPLATES_FOLDER)
        inner, more = _names_in(templates)
        names += [f"{TEMPLATES_FOLDER}/{name}" for name in inner]
        others += more

    def found() -> Iterator[tuple[str, bytes]]:
        for name in names:
            if name in expected:
                continue
            kind = _kind(name)
            if kind is None or name in OWN_NAMES:
                others.append(name)
                continue
            try:
                yield name, read_contained_bytes(directory, name, LONGEST_BYTES[kind])
            except OSError as error:
                others.append(f"{name} ({error.strerror})")

    return found(), others


def _names_in(directory: Path) -> tuple[list[str], list[str]]:
    """The names in a directory, sorted, and those that a checkpoint's manifest could not list, or too many."""
    try:
        with os.scandir(directory) as entries:
            names = sorted(entry.name for entry in itertools.islice(entries, MOST_NAMES + 1))
    except OSError as error:
        return [], [f"{directory.name} ({error.strerror})"]
    others = [f"more than {MOST_NAMES} files of {directory.name}"] * (len(names) > MOST_NAMES)
    strange = [name for name in names if not name.isprintable() or "\\" in name]
    return [name for name in names[:MOST_NAMES] if name not in strange], others + [ascii(name) for name in strange]


def _kind(name: str) -> str | None:
    """The suffix that says how a file is checked; None: it is not copied."""
    folder, _, base = name.rpartition("/")
    suffix = Path(base).suffix
    if folder:
        return suffix if folder == TEMPLATES_FOLDER and suffix == ".jinja" else None
    if suffix not in LONGEST_BYTES or base in MISLEADING_NAMES or base.endswith(".index.json"):
        return None
    if suffix == ".txt" and base not in NAMED_TEXTS:
        return None
    return suffix


def _left_out(problem: Problem) -> str:
    """A file that is not what it is named, or a key that was taken out of it, in words."""
    name = Path(problem.where).name
    return f"{problem.key} ({problem.found})" if problem.key.endswith(name) else f"{problem.key} of {name}"


def _checked(name: str, content: bytes) -> tuple[bytes, list[tuple[str, Any]]]:
    """A file's contents without keys that name code, and these keys with their values.

    Raises:
        ValueError: it is not what its name says.
    """
    kind = Path(name).suffix
    if kind == ".model":
        if not (_is_sentencepiece(content) or _is_tiktoken(content)):
            raise ValueError("neither a sentencepiece model nor a list of tiktoken's")
        return content, []
    value = check_named_text(Path(name).name, content)
    if name == "tokenizer.json":
        parse_definition(content.decode("utf-8"))
    named_code = list(code_keys(value)) if isinstance(value, dict) else []
    return (json.dumps(_without_code(value), indent=2).encode() if named_code else content), named_code


def _code_problems(path: Path, named_code: list[tuple[str, Any]]) -> list[Problem]:
    """Keys of a file that name code, each as a problem."""
    return [Problem(str(path), key, json.dumps(value)[:100], _NO_CODE) for key, value in named_code]


def _without_code(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object without the keys that `code_keys` finds."""
    return {
        key: _without_code(item) if isinstance(item, dict) else item
        for key, item in value.items()
        if not (key in CODE_KEYS and item)
    }


def _is_sentencepiece(content: bytes) -> bool:
    from sentencepiece import SentencePieceProcessor

    try:
        return bool(SentencePieceProcessor(model_proto=content).vocab_size())
    except (RuntimeError, ValueError):
        return False


def _is_tiktoken(content: bytes) -> bool:
    """Whether every line is a token in base64 and its number."""
    try:
        for line in content.splitlines():
            token, number = line.split()
            base64.b64decode(token, validate=True)
            int(number)
    except ValueError:
        return False
    return bool(content)


def _as_json(content: object) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
