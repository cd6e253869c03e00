"""Learning rate as a pure function of the step."""

import math
from typing import Literal


def learning_rate(
    step: int,
    *,
    peak: float,
    scheduler: Literal["constant", "linear", "cosine"],
    warmup_steps: int,
    total_steps: int,
) -> float:
    """Learning rate of optimizer step `step` (0-based).

    Linear warm-up reaches the peak at step `warmup_steps`; `linear` and `cosine` then fall towards 0, which the
    step after the last one would have.

    Args:
        peak: learning rate after warm-up, per step.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if scheduler == "linear":
        return peak * (1.0 - progress)
    if scheduler == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak
