"""Export a checkpoint as a Hugging Face model directory."""

from pathlib import Path

from ebft_mega.apps.convert.result import Converted, require_own_place
from ebft_mega.apps.convert.tensor_copy import DTYPES, converted_tensors
from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.checkpoint.commit import CHECKPOINTS, newest, step_of
from ebft_mega.checkpoint.describing_files import read_describing_files
from ebft_mega.checkpoint.initial_model import open_weights
from ebft_mega.checkpoint.manifest import file_problems
from ebft_mega.checkpoint.model_folder import is_checkpoint, open_model_folder
from ebft_mega.errors import BrokenCheckpointError, InputError, Problem
from ebft_mega.io.progress_bar import track
from ebft_mega.model.weights.model_directory import write_model


def export_checkpoint(path: Path, output: Path, dtype: str, shard_bytes: int, overwrite: bool = False) -> Converted:
    """Write a checkpoint's model as a Hugging Face directory; every file is compared with its hash before it is read.

    Args:
        path: a checkpoint folder, or a run directory or its `checkpoints`, of which the newest one is taken.
        output: the directory to make.
        dtype: of the written weights, by torch's name.
        shard_bytes: most bytes of tensors in one file.
        overwrite: replace a model at `output`.
    Raises:
        InputError: there is no checkpoint, one would be replaced, or `dtype` cannot represent a value.
        BrokenCheckpointError: files are missing or have changed since they were written.
    """
    found = checkpoint_folder(path)
    require_own_place(found, output)
    folder = open_model_folder(found, hash_weights=False)
    architecture = Architecture.from_directory(folder.directory)
    files = track(folder.weight_files, len(folder.weight_files), "files checked")
    problems = [problem for name in files for problem in file_problems(folder.directory, folder.manifest, [name])]
    if problems:
        raise BrokenCheckpointError(problems)
    weights = open_weights(folder.directory, architecture, hash_files=False)
    described = read_describing_files(folder.directory)
    write_model(
        output,
        architecture,
        converted_tensors(weights, architecture, DTYPES[dtype]),
        DTYPES[dtype],
        described_by=described.contents,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
    )
    notes = [*described.notes, *["there is no tokenizer"] * (not described.has_tokenizer)]
    return Converted(folder.directory, output, dtype, tuple(notes))


def checkpoint_folder(path: Path) -> Path:
    """Find the checkpoint that a path refers to.

    Args:
        path: a checkpoint folder, a folder of checkpoints, or a run directory.
    Raises:
        InputError: there is none.
    """
    if is_checkpoint(path) or (path.is_dir() and step_of(path.name) is not None):
        return path
    root = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    name = newest(root)
    if name is None:
        found = "no checkpoint" if path.is_dir() else "no such directory"
        expected = "a checkpoint folder, or a run directory with complete checkpoints"
        raise InputError([Problem("--checkpoint", str(path), found, expected)])
    return root / name
