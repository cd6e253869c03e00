"""The inputs of a stage's layers, kept while a rollout is decoded, for the gradient pass (`model/replay.py`)."""

import torch
from torch import Tensor


class SavedInputs:
    """Inputs of a stage's layers, pass by pass; where the stage has the head, also the output of its last layer."""

    def __init__(self, num_layers: int, has_output: bool):
        """Start empty."""
        self._pieces: list[list[Tensor]] = [[] for _ in range(num_layers + has_output)]

    def add(self, layer: int, entering: Tensor) -> None:
        """Keep what entered a layer (or left the last one) in one more pass: [S of the pass / shards, B, H]."""
        self._pieces[layer].append(entering.detach())

    def take(self, layer: int) -> Tensor:
        """What entered a layer in all passes, one behind the other, [S / shards, B, H]; it is not kept any longer."""
        pieces, self._pieces[layer] = self._pieces[layer], []
        return torch.cat(pieces)

    def shape(self) -> tuple[int, ...]:
        """Shape of the hidden states of all passes together."""
        shapes = [piece.shape for piece in self._pieces[0]]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def placeholder(self) -> Tensor:
        """A tensor of that shape for a gradient to arrive at or to come from; it holds one value."""
        return self._pieces[0][0].new_zeros(()).expand(self.shape())
