"""An optimizer: Lion (Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675).

It keeps one moment where AdamW keeps two, and every element moves by the learning rate: take a third to a tenth of
AdamW's.
"""

# In a configuration:
#     plugins: [lion.py]  # a copy beside the configuration
#     train: {optimizer: lion, lr: 1.0e-7, weight_decay: 0.1, betas: [0.9, 0.99]}

from collections.abc import Sequence

from ebft_mega.extension.update_rule import Optimizer, UpdateSettings, UpdateSlice


class Lion(Optimizer):
    """Lion: the sign of an interpolation of momentum and gradient."""

    name = "lion"
    moments = ("momentum",)
    temporaries = 1

    def update(self, slices: Sequence[UpdateSlice], updates: int, settings: UpdateSettings) -> None:
        """Algorithm 2 of the paper, element by element."""
        first, second = settings.betas
        for part in slices:
            (momentum,) = part.moments
            direction = momentum.mul(first).add_(part.gradient, alpha=1 - first).sign_()
            part.weights.mul_(1 - settings.lr * settings.weight_decay).add_(direction, alpha=-settings.lr)
            momentum.mul_(second).add_(part.gradient, alpha=1 - second)
