"""Optimizers that are no entries of the package: one without a moment, one with one, one that breaks its contract."""

from collections.abc import Sequence

import torch.distributed as dist

from ebft_mega.extension.update_rule import Optimizer, UpdateSettings, UpdateSlice


class Sgd(Optimizer):
    """Gradient descent with decoupled weight decay."""

    name = "sgd"
    temporaries = 0

    def update(self, slices: Sequence[UpdateSlice], updates: int, settings: UpdateSettings) -> None:
        """One step against the gradient."""
        for part in slices:
            part.weights.mul_(1 - settings.lr * settings.weight_decay).add_(part.gradient, alpha=-settings.lr)


class Momentum(Optimizer):
    """Gradient descent with momentum and decoupled weight decay; the first step has a tenth of the rate."""

    name = "momentum"
    moments = ("velocity",)
    temporaries = 0

    def update(self, slices: Sequence[UpdateSlice], updates: int, settings: UpdateSettings) -> None:
        """One step against the sum of gradients."""
        rate = settings.lr * (0.1 if updates == 0 else 1.0)
        for part in slices:
            (velocity,) = part.moments
            velocity.mul_(settings.betas[0]).add_(part.gradient)
            part.weights.mul_(1 - settings.lr * settings.weight_decay).add_(velocity, alpha=-rate)


class Broken(Momentum):
    """What a test asks for, on the last rank alone."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def update(self, slices: Sequence[UpdateSlice], updates: int, settings: UpdateSettings) -> None:
        """Break in one of several ways."""
        super().update(slices, updates, settings)
        if dist.get_rank() < dist.get_world_size() - 1:
            return
        part = slices[-1]
        if self.fault == "not finite":
            part.moments[0][-1] = float("inf")
        elif self.fault == "elsewhere":
            part.weights.data = part.weights + 1
        elif self.fault == "dtype":
            part.moments[0].data = part.moments[0].double()
        else:
            raise IndexError("too far")
