"""Check that a model directory holds all its weights, by file names, sizes, headers and manifests. No torch."""

from pathlib import Path

from ebft_mega.checkpoint.model_folder import is_checkpoint, open_model_folder
from ebft_mega.errors import InputProblems, Problem
from ebft_mega.model.weights.weight_files import stored_tensors


def weight_file_problems(directory: Path) -> list[Problem]:
    """List what is missing or truncated in the weights of a model directory.

    Weights are not read. Of a checkpoint the small files are compared with its manifest.

    Args:
        directory: a Hugging Face model directory, or a checkpoint folder of this trainer.
    """
    if not is_checkpoint(directory):
        return stored_tensors(directory)[1]
    try:
        open_model_folder(directory, hash_weights=False)
    except InputProblems as error:
        return list(error.problems)
    return []
