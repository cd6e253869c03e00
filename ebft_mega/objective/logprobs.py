"""Log-probabilities of chosen tokens."""

import torch
from torch import Tensor


def selected_logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Log-softmax of `logits / temperature` at chosen tokens.

    Several tokens may be scored by one row of logits, at the price of one normaliser.

    Args:
        logits: [..., V]; upcast to float32 (float64 stays).
        tokens: int64 [..., m].
    Returns:
        float32 (or float64) [..., m].
    Communication: none.
    """
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return scaled.gather(-1, tokens) - scaled.logsumexp(dim=-1, keepdim=True)
