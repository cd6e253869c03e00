"""What Adam divides each element of a gradient by, from the second moments of a checkpoint."""

from pathlib import Path

import torch
from torch import Tensor

from ebft_mega.architecture.tensor_shapes import hf_shapes
from ebft_mega.checkpoint.model_folder import is_checkpoint, open_model_folder
from ebft_mega.checkpoint.saved_run import read_run
from ebft_mega.checkpoint.tensors import CheckpointTensors
from ebft_mega.model.stage import Stage
from ebft_mega.model.weights.weight_layout import packing_of
from ebft_mega.parallel.optimizers.adamw import EPSILON

SECOND_MOMENT = "exp_avg_sq"


def adam_scale(directory: Path, stage: Stage, beta: float) -> dict[str, Tensor] | None:
    """`scale_of_moments` of the model that is measured.

    Args:
        directory: the model.
        stage, beta: see there.
    Returns:
        None: it is no checkpoint, or one without second moments or updates.
    Raises:
        BrokenCheckpointError: files are missing or altered.
    Communication: none.
    """
    if not is_checkpoint(directory):
        return None
    tensors = CheckpointTensors(directory, open_model_folder(directory, hash_weights=False).index)
    updates = read_run(directory).state.optimizer_updates
    if SECOND_MOMENT not in tensors.index.kinds or not updates:
        return None
    return scale_of_moments(tensors, stage, beta, updates)


def scale_of_moments(tensors: CheckpointTensors, stage: Stage, beta: float, updates: int) -> dict[str, Tensor]:
    """1 / (sqrt(v) + epsilon) of every element, v the second moment without its bias towards zero.

    Args:
        stage: the whole model, on one rank.
        beta: averaging factor of the second moments.
        updates: that the moments are of.
    Returns:
        float32 by parameter of the stage.
    Communication: none.
    """
    shapes, device = hf_shapes(stage.architecture), next(stage.parameters()).device
    found = {}
    for name, _ in stage.named_parameters():
        packing = packing_of(name, stage.architecture, stage.shape.first_layer, 1)
        moments = packing.pack(
            tuple(tensors.part(SECOND_MOMENT, each, packing.box(shapes[each], 0)) for each in packing.sources)
        )
        found[name] = (1 / ((moments / (1 - beta**updates)).sqrt() + EPSILON)).to(device, torch.float32)
    return found
