"""Turn a non-finite loss or reward into a NaN gradient, so that the optimizer's check skips the step on every rank."""

from collections.abc import Sequence

import torch
from torch import Tensor


def guarded(loss: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """The loss to descend: unchanged, or NaN with a NaN gradient when it or an input is not finite.

    The gradient of a loss of plus infinity can be finite, and so can the loss of rewards that are not. DeepSpeed looks
    at gradients alone and does so on all ranks together: through the gradient every rank learns of such a loss
    without a collective of its own, and without waiting for the device.

    Args:
        loss: [] with gradient.
        inputs: what the loss was made from, of any shape, such as rewards.
    Returns:
        [] with gradient; bit for bit the loss when everything is finite.
    Communication: none.
    """
    finite = torch.isfinite(loss.detach())
    for values in inputs:
        finite = finite & torch.isfinite(values).all()
    return loss * torch.where(finite, 1.0, torch.nan).to(loss.dtype)
