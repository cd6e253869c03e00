"""Import a model: check an untrusted Hugging Face directory and rewrite it in the form that training starts from."""

from pathlib import Path

import torch

from ebft_mega.apps.convert.result import Converted, require_own_place
from ebft_mega.apps.convert.tensor_copy import DTYPES, converted_tensors
from ebft_mega.checkpoint.describing_files import DescribingFiles, read_describing_files
from ebft_mega.checkpoint.model_folder import is_checkpoint
from ebft_mega.data.tokenizers.tokenizer import load_tokenizer, tokenizer_sha256
from ebft_mega.errors import InputError, InputProblems, Problem
from ebft_mega.model.weights.model_directory import write_model
from ebft_mega.model.weights.weight_sources import SafetensorsWeights
from ebft_mega.planning.model_files import CheckedModel, check_model


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
    require_own_place(source, output)
    described = read_describing_files(source)
    model = _checked(described)
    architecture = model.architecture
    weights = SafetensorsWeights(source, architecture)
    chosen = _common_dtype(weights) if dtype is None else DTYPES[dtype]
    write_model(
        output,
        architecture,
        converted_tensors(weights, architecture, chosen),
        chosen,
        described_by=described.contents,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
    )
    return Converted(source, output, str(chosen).removeprefix("torch."), (*model.notes, *_notes(described)))


def _common_dtype(weights: SafetensorsWeights) -> torch.dtype:
    """The dtype of all tensors if they have the same one and it is a choice of `--dtype`; else float32."""
    dtypes = set(weights.dtypes.values())
    only = dtypes.pop()
    return only if not dtypes and only in DTYPES.values() else torch.float32


def _checked(described: DescribingFiles) -> CheckedModel:
    """Check the model that files describe; raise all problems at once."""
    source = described.directory
    problems: list[Problem] = []
    model = None
    try:
        model = check_model(source)
    except InputProblems as error:
        problems += error.problems
    named = {problem.where for problem in problems}
    problems += [problem for problem in described.problems if problem.where not in named]
    if tokenizer_sha256(source) is not None:
        try:
            size = load_tokenizer(source).vocab_size
        except InputProblems as error:
            named = {problem.where for problem in problems}
            problems += [problem for problem in error.problems if problem.where not in named]
        else:
            if model is not None and size > model.architecture.vocab_size:
                found, expected = f"{size} tokens", f"at most the model's vocab_size {model.architecture.vocab_size}"
                problems.append(Problem(str(source), "tokenizer", found, expected))
    if problems or model is None:
        raise InputError(problems)
    return model


def _notes(described: DescribingFiles) -> list[str]:
    """What the result lacks compared with the source, as messages."""
    notes = [f"left out: {', '.join(described.others)}"] * bool(described.others)
    return notes + ["there is no tokenizer"] * (not described.has_tokenizer)
