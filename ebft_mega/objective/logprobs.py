"""Log-probabilities of chosen tokens."""

import torch
from torch import Tensor


def selected_logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Log-probability of chosen tokens under the softmax at a temperature.

    Args:
        logits: [..., V], any float dtype.
        tokens: int64 [..., m], m choices from each row of logits.
        temperature: > 0; that of the sampling for rollouts, 1 for targets. Tokens that a nucleus left out are
            scored by the full softmax, too.
    Returns:
        float32 [..., m] (float64 for float64 logits), with gradient.
    Communication: none.
    Source: EBFT paper (arXiv 2603.12248); the authors' code scores at the sampling temperature, in float32.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    # Cast before the division: bfloat16 has 8 bits of mantissa, a rounded logit of 30 is off by a tenth.
    return (logits.to(dtype) / temperature).log_softmax(dim=-1).gather(-1, tokens)
