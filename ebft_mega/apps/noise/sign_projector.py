"""Project gradients onto directions of random signs, as they are and as Adam scales them."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ebft_mega.errors import EbftError
from ebft_mega.model.stage import Stage
from ebft_mega.model.weights.sign_directions import parameter_signs
from ebft_mega.parallel.zero import GradientPart

# Elements that are added up in float32, before sums of them are added up in float64.
ELEMENTS_AT_ONCE = 2**16


class SignProjector:
    """The directions of a model of one rank; they are made once and take a byte for each element of each of them."""

    def __init__(self, stage: Stage, num_directions: int, scale: Mapping[str, Tensor] | None = None):
        """Draw the signs.

        Args:
            num_directions: D; direction d has the signs of direction d of a step trace.
            scale: what each element of a gradient is multiplied by, by parameter; None: nothing.
        """
        self._names = [name for name, _ in stage.named_parameters()]
        self._sizes = [parameter.numel() for _, parameter in stage.named_parameters()]
        device = next(stage.parameters()).device
        self._signs = torch.empty((num_directions, sum(self._sizes)), dtype=torch.int8, device=device)
        for name, columns in zip(self._names, self._signs.split(self._sizes, dim=1), strict=True):
            for direction in range(num_directions):
                columns[direction] = parameter_signs(stage, name, direction).flatten()
        self._scale = None if scale is None else torch.cat([scale[name].flatten() for name in self._names])

    def flattened(self, parts: Iterable[GradientPart]) -> Tensor:
        """A gradient as one vector, a copy: float32 [elements].

        Args:
            parts: as an engine shows them, of all parameters.
        Raises:
            EbftError: it is not finite.
        """
        values = {part.parameter: part.values for part in parts}
        vector = torch.cat([values[name].flatten() for name in self._names])
        if not vector.isfinite().all():
            raise EbftError("a gradient is not finite")
        return vector

    def projections(self, gradients: Tensor) -> Tensor:
        """Inner products with all directions: float32 [M, elements] -> float64 [M, D]."""
        found = torch.zeros((len(gradients), len(self._signs)), dtype=torch.float64, device=gradients.device)
        for values, signs in zip(
            gradients.split(ELEMENTS_AT_ONCE, dim=1), self._signs.split(ELEMENTS_AT_ONCE, dim=1), strict=True
        ):
            found += values @ signs.to(values.dtype).T
        return found

    def scaled_projections(self, gradients: Tensor) -> Tensor | None:
        """The same of gradients that are scaled before; None: there is no scale."""
        return None if self._scale is None else self.projections(gradients * self._scale)
