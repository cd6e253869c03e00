"""Contract of an optimizer: how master weights are updated from their gradients."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ebft_mega.extension.entry import Entry

if TYPE_CHECKING:
    from torch import Tensor

# Moments are folders of a checkpoint, beside that of the weights, and lie beside a count of steps.
MOMENT_NAME = "[a-z][a-z0-9_]*"
RESERVED_MOMENTS = ("weights", "step", "critic")


@dataclass(frozen=True)
class UpdateSettings:
    """What a step is made with, for one group of parameters."""

    lr: float
    weight_decay: float  # 0 for norms and biases
    betas: tuple[float, float]  # `train.betas`


@dataclass(frozen=True)
class UpdateSlice:
    """A row of elements of one parameter. All tensors are float32 [X] on one device, views of what is stored."""

    weights: "Tensor"
    gradient: "Tensor"  # summed over all ranks, clipped, finite
    moments: tuple["Tensor", ...]  # in the order of `Optimizer.moments`; zero before the first update


class Optimizer(Entry):
    """An entry of `train.optimizer`.

    ZeRO and tensor parallelism cut parameters into slices of any size and at any place, and an update is made of a
    bounded number of elements at a time: it must be element by element, so that no bit depends on the cuts. Norms of
    tensors, matrix products and random numbers are therefore not possible.

    What a plugin's optimizer leaves is looked at after every update: tensors in their places, and finite numbers.
    """

    # Names of the float32 tensors that are kept for every parameter: folders of a checkpoint, bytes of the memory plan.
    moments: ClassVar[tuple[str, ...]] = ()
    temporaries: ClassVar[int] = 2  # float32 tensors as large as what is updated that an update makes at once

    def update(self, slices: Sequence[UpdateSlice], updates: int, settings: UpdateSettings) -> None:
        """Update weights and moments in place, without recording gradients.

        Args:
            slices: of one group of parameters, which have had equally many updates.
            updates: how many updates these parameters have had before this one; skipped steps do not count.
        Communication: none.
        """
        raise NotImplementedError
