"""Inner products of the reduced gradient with fixed directions of signs, the same at every layout and ZeRO stage."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from ebft_mega.model.stage import Stage
from ebft_mega.model.weights.sign_directions import NUM_DIRECTIONS, parameter_signs
from ebft_mega.parallel.zero import GradientPart

# Of a gradient this many elements at a time are converted to float64.
CHUNK_ELEMENTS = 2**22


class GradientProjections:
    """What an engine shows its gradient to, and the projections that come of it."""

    def __init__(self, stage: Stage, num_directions: int = NUM_DIRECTIONS) -> None:
        """Args: stage: this rank's; its parameters are not looked at, only what they are."""
        self._stage, self._roles = stage, stage.parameter_roles()
        self._sums = torch.zeros(num_directions, dtype=torch.float64, device=stage.groups.device)

    @torch.no_grad()
    def look(self, parts: Iterable[GradientPart]) -> None:
        """Add up this rank's part of every projection; `ZeroEngine.step` calls it.

        The signs of a parameter are drawn whole for each direction (a byte per element), whatever part is shown.
        """
        rank = self._stage.groups.tensor_parallel_rank
        for part in parts:
            if not part.values.numel() or not self._roles[part.parameter].is_counted(rank):
                continue
            for direction in range(len(self._sums)):
                signs = parameter_signs(self._stage, part.parameter, direction).flatten()[part.start :]
                self._sums[direction] += _inner_product(part.values.flatten(), signs[: part.values.numel()])

    def total(self) -> list[float]:
        """The projections of the whole gradient, in float64.

        Communication: one all-reduce of 8 bytes per direction over the world.
        """
        sums = self._sums.clone()
        dist.all_reduce(sums)
        found: list[float] = sums.tolist()
        return found


def _inner_product(values: Tensor, signs: Tensor) -> Tensor:
    """Of a gradient, float32 [elements], with signs on the CPU: float64 []."""
    chunks = zip(values.split(CHUNK_ELEMENTS), signs.split(CHUNK_ELEMENTS), strict=True)
    return torch.stack([chunk.double().dot(own.to(chunk.device).double()) for chunk, own in chunks]).sum()
