"""Import a model: check an untrusted Hugging Face directory and rewrite it in the form that training starts from."""

import json
from pathlib import Path
from typing import Any

import torch

from ebft_mega.apps.convert.result import Converted
from ebft_mega.apps.convert.tensor_copy import DTYPES, converted_tensors
from ebft_mega.architecture.hf_config import Architecture, code_keys
from ebft_mega.checkpoint.model_folder import is_checkpoint
from ebft_mega.data.text.tokenizer import TOKENIZER_FILES, load_tokenizer, tokenizer_sha256
from ebft_mega.errors import InputError, InputProblems, Problem
from ebft_mega.io.input_errors import read_json_object
from ebft_mega.model.weights.model_directory import CONFIG_NAME, GENERATION_CONFIG_NAME, write_model
from ebft_mega.model.weights.weight_files import INDEX_NAME, stored_tensors
from ebft_mega.model.weights.weight_sources import SafetensorsWeights

_JSON_NAMES = (GENERATION_CONFIG_NAME, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def import_model(source: Path, output: Path, dtype: str | None, shard_bytes: int, overwrite: bool = False) -> Converted:
    """Check a model directory and write the files that a model consists of, and no others, to another directory.

    Nothing in the directory is executed or unpickled; only JSON, safetensors and tokenizer files are read.

    Args:
        source: a Hugging Face directory.
        output: the directory to make.
        dtype: of the written weights, by torch's name; None: that of the source; float32 if the source has
            several dtypes, or float64.
        shard_bytes: most bytes of tensors in one file.
        overwrite: replace a model at `output`.
    Raises:
        InputError: everything that is wrong with the directory, at once; after that, once all tensors have been read,
            every tensor with values that are not finite.
    """
    if is_checkpoint(source):
        problem = Problem(
            "--input", str(source), "a checkpoint of this trainer", "a Hugging Face directory; see export"
        )
        raise InputError([problem])
    architecture, weights = _checked(source)
    chosen = _common_dtype(weights) if dtype is None else DTYPES[dtype]
    write_model(
        output,
        architecture,
        converted_tensors(weights, architecture, chosen, source),
        chosen,
        tokenizer=source if tokenizer_sha256(source) else None,
        generation_config=source / GENERATION_CONFIG_NAME if (source / GENERATION_CONFIG_NAME).is_file() else None,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
    )
    return Converted(source, output, str(chosen).removeprefix("torch."), tuple(_notes(source, weights)))


def _common_dtype(weights: SafetensorsWeights) -> torch.dtype:
    """The dtype of all tensors if they have the same one and it is a choice of `--dtype`; else float32."""
    dtypes = set(weights.dtypes.values())
    only = dtypes.pop()
    return only if not dtypes and only in DTYPES.values() else torch.float32


def _checked(source: Path) -> tuple[Architecture, SafetensorsWeights]:
    """Open the model in a directory; raise all problems at once."""
    problems: list[Problem] = []
    architecture = weights = None
    try:
        architecture = Architecture.from_directory(source)
        weights = SafetensorsWeights(source, architecture)
    except InputProblems as error:
        problems += error.problems
    if architecture is None:
        problems += stored_tensors(source)[1]
    problems += _code_in_json(source)
    if tokenizer_sha256(source) is not None:
        try:
            size = load_tokenizer(source).vocab_size
        except InputProblems as error:
            problems += error.problems
        else:
            if architecture is not None and size > architecture.vocab_size:
                found, expected = f"{size} tokens", f"at most the model's vocab_size {architecture.vocab_size}"
                problems.append(Problem(str(source), "tokenizer", found, expected))
    if problems or architecture is None or weights is None:
        raise InputError(problems)
    return architecture, weights


def _code_in_json(source: Path) -> list[Problem]:
    """Problems of JSON files beside `config.json`: not a JSON object, or a key that names code to run."""
    problems: list[Problem] = []
    for name in _JSON_NAMES:
        path = source / name
        try:
            content: dict[str, Any] = read_json_object(path, "JSON") if path.is_file() else {}
        except InputError as error:
            problems += error.problems
            continue
        expected = "no such key: code named by a model directory is never run"
        problems += [Problem(str(path), key, json.dumps(value)[:100], expected) for key, value in code_keys(content)]
    return problems


def _notes(source: Path, weights: SafetensorsWeights) -> list[str]:
    """What the result lacks compared with the source, as messages."""
    known = {CONFIG_NAME, GENERATION_CONFIG_NAME, INDEX_NAME, *TOKENIZER_FILES, *weights.digest_names()}
    left_out = sorted(path.name for path in source.iterdir() if path.name not in known)
    notes = [f"left out, and not opened: {', '.join(left_out)}"] * bool(left_out)
    return notes + ["there is no tokenizer"] * (tokenizer_sha256(source) is None)
