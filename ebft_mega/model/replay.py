"""Gradient of the layers from the inputs saved during the rollout: each layer is recomputed once, in the backward pass.

The update is strictly on-policy, so the passes that sampled the tokens were the policy's forward pass. With every
layer's input saved, no second forward pass is needed: the backward pass recomputes one layer at a time, as activation
checkpointing does.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ebft_mega.model.saved_activations import SavedInputs
from ebft_mega.model.stage import Stage
from ebft_mega.model.strided_attention import StridedLayout


def replay(
    stage: Stage,
    saved: SavedInputs,
    entering: Tensor,
    positions: Tensor,
    layout: StridedLayout,
    pass_lengths: Sequence[int],
) -> Tensor:
    """A stage's layers over the packed pass, from saved inputs; computed only in the backward pass.

    Args:
        saved: emptied by the backward pass, layer by layer.
        entering: what the first layer's gradient flows to, [S / shards, 1, H] with gradient; its value is not read.
        positions: int64 [S]; layout: of the packed pass.
        pass_lengths: positions of each pass that filled `saved`.
    Returns:
        [S / shards, 1, H] before the final norm; where the stage has no head a placeholder for its gradient.
    Communication: in the backward pass that of the layers, forward and backward.
    """
    hidden: Tensor = _Replay.apply(entering, stage, saved, stage.angles(positions, pass_lengths), layout)
    return hidden


class _Replay(torch.autograd.Function):
    """Reentrant checkpointing of all layers without its first forward pass."""

    @staticmethod
    def forward(
        ctx: Any, entering: Tensor, stage: Stage, saved: SavedInputs, angles: Tensor, layout: StridedLayout
    ) -> Tensor:
        ctx.stage, ctx.saved, ctx.angles, ctx.layout = stage, saved, angles, layout
        return saved.take(stage.shape.num_layers) if stage.shape.has_head else saved.placeholder()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        for index in reversed(range(len(ctx.stage.layers))):
            entering = ctx.saved.take(index).requires_grad_()
            with torch.enable_grad():
                leaving, _ = ctx.stage.layers[index](entering, ctx.layout, rotary_pos_emb=ctx.angles)
            torch.autograd.backward(leaving, gradient)
            assert entering.grad is not None, "every layer passes a gradient on"
            gradient = entering.grad
            del entering, leaving  # before the next layer's are made
        return gradient, None, None, None, None
