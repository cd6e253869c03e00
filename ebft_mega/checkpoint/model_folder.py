"""Checkpoint folders given where a model directory is expected: recognised, and checked by their manifest. No torch."""

from dataclasses import dataclass
from pathlib import Path

from ebft_mega.checkpoint.manifest import MANIFEST_NAME, Manifest, file_problems, read_listed, read_manifest
from ebft_mega.checkpoint.tensor_index import INDEX_NAME, TensorIndex, coverage_problems
from ebft_mega.errors import BrokenCheckpointError, Problem

WEIGHTS_FOLDER = "weights/"


@dataclass(frozen=True)
class ModelFolder:
    """The model in a checkpoint folder whose small files match its manifest."""

    directory: Path
    manifest: Manifest
    index: TensorIndex

    @property
    def weight_files(self) -> list[str]:
        """Files with weights, relative to the folder."""
        return weight_files(self.manifest)


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory is a checkpoint of this trainer rather than a Hugging Face model."""
    return (directory / MANIFEST_NAME).is_file() and (directory / INDEX_NAME).is_file()


def weight_files(manifest: Manifest) -> list[str]:
    """Files of a checkpoint with weights, relative to its folder."""
    return [name for name in manifest.files if name.startswith(WEIGHTS_FOLDER)]


def open_model_folder(directory: Path, hash_weights: bool) -> ModelFolder:
    """Check the model in a checkpoint folder. The optimizer's state is not looked at.

    Args:
        directory: a checkpoint folder.
        hash_weights: compare the contents of the files of weights with the manifest, not just their sizes. That reads
            all of them.
    Raises:
        BrokenCheckpointError: a file is missing or another one than was written, or the index is not that of a whole
            model; all problems at once.
        InputError: a newer version of this program has written the folder.
    """
    manifest = read_manifest(directory)
    small, weights = [name for name in manifest.files if "/" not in name], weight_files(manifest)
    problems = file_problems(directory, manifest, [*small, *weights] if hash_weights else small)
    if not hash_weights:
        problems += _wrong_sizes(directory, manifest, weights)
    if problems:
        raise BrokenCheckpointError(problems)
    index = TensorIndex.from_json(read_listed(directory, manifest, INDEX_NAME), str(directory / INDEX_NAME))
    problems = coverage_problems(index, str(directory / INDEX_NAME))
    named = {shard.file for tensor in index.kinds.get("weights", {}).values() for shard in tensor.shards}
    problems += [
        Problem(str(directory / INDEX_NAME), "weights", f"a shard in {name}", "files that the manifest lists")
        for name in sorted(named.difference(weights))
    ]
    if problems:
        raise BrokenCheckpointError(problems)
    return ModelFolder(directory, manifest, index)


def _wrong_sizes(directory: Path, manifest: Manifest, names: list[str]) -> list[Problem]:
    """Files that are missing or not as long as the manifest says."""
    problems = []
    for name in names:
        path, expected = directory / name, f"{manifest.files[name].bytes} bytes"
        found = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
        if found != expected:
            problems.append(Problem(str(path), name, found, expected))
    return problems
