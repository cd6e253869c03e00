"""Layer inputs saved while a rollout is decoded: activation checkpoints of the gradient pass (`model/replay.py`)."""

import torch
from torch import Tensor


class SavedInputs:
    """Inputs of a stage's layers, pass by pass; where the stage has the head, also the output of its last layer."""

    def __init__(self, num_layers: int, has_output: bool):
        """Start empty."""
        self._inputs: list[list[Tensor]] = [[] for _ in range(num_layers + has_output)]

    def add(self, layer: int, entering: Tensor) -> None:
        """Save what entered a layer (or left the last one) in one more pass: [S of the pass / shards, 1, H]."""
        self._inputs[layer].append(entering.detach())

    def take(self, layer: int) -> Tensor:
        """What entered a layer in all passes, one behind the other, [S / shards, 1, H]; it is freed here."""
        inputs, self._inputs[layer] = self._inputs[layer], []
        return torch.cat(inputs)

    def shape(self) -> tuple[int, ...]:
        """Shape of the hidden states of all passes together."""
        shapes = [entering.shape for entering in self._inputs[0]]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def placeholder(self) -> Tensor:
        """A tensor of that shape for a gradient to arrive at or to come from; it holds one value."""
        return self._inputs[0][0].new_zeros(()).expand(self.shape())
