"""Open initial weights, or those of the feature network: a Hugging Face directory or a checkpoint of another run."""

from dataclasses import dataclass
from pathlib import Path

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.checkpoint.manifest import Manifest
from ebft_mega.checkpoint.model_folder import is_checkpoint, open_model_folder, weight_files
from ebft_mega.checkpoint.tensors import CheckpointTensors, CheckpointWeights, check_tensors
from ebft_mega.model.weights.weight_sources import InitialWeights, SafetensorsWeights


@dataclass(frozen=True)
class RecordedWeights(CheckpointWeights):
    """Weights of a checkpoint, whose manifest says what they are."""

    manifest: Manifest

    def digest_names(self) -> list[str]:
        """The files with weights."""
        return weight_files(self.manifest)

    def digest(self, name: str) -> str:
        """The manifest's hash of a file; nothing is read."""
        return self.manifest.files[name].sha256


def open_weights(
    directory: Path, architecture: Architecture, num_layers: int | None = None, hash_files: bool = True
) -> InitialWeights:
    """Check a model and make its weights readable, tensor by tensor.

    Args:
        directory: a Hugging Face directory, or a checkpoint folder of this trainer, of which only the weights count.
        architecture: what `config.json` in it says.
        num_layers: of a Hugging Face directory only the lowest layers are needed, and no head; None: the whole model.
        hash_files: compare a checkpoint's files of weights with its manifest, which reads them all; False where that
            has been done.
    Raises:
        InputError, BrokenCheckpointError: files are missing, cut off or altered, or tensors do not fit; all problems
            at once.
    """
    if not is_checkpoint(directory):
        return SafetensorsWeights(directory, architecture, num_layers)
    folder = open_model_folder(directory, hash_files)
    tensors = CheckpointTensors(directory, folder.index)
    check_tensors(tensors, architecture, ("weights",))
    return RecordedWeights(tensors, folder.manifest)
