"""Corrections for the number of comparisons that were named beforehand."""

from collections.abc import Sequence

import numpy as np


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values step by step, such that the chance of any false direction stays below the level chosen.

    The smallest is multiplied by their number, the next by one less, and so on; none may fall below one before it.

    Args:
        p_values: [M], each within [0, 1].
    Returns:
        [M] corrected p values, in the order given.
    Raises:
        ValueError: a value out of range.
    Source: Holm, A Simple Sequentially Rejective Multiple Test Procedure (1979).
    """
    values = np.asarray(p_values, dtype=np.float64)
    if values.ndim != 1 or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"p values lie within [0, 1], found {list(p_values)}")
    order = np.argsort(values, kind="stable")
    stepped = values[order] * (len(values) - np.arange(len(values)))
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(np.maximum.accumulate(stepped), 1.0) if len(values) else stepped
    return [float(value) for value in corrected]


def simultaneous_confidence(number: int, confidence: float = 0.95) -> float:
    """Return the confidence that each of several intervals needs for all of them to hold at once (Bonferroni).

    Args:
        number: of intervals, at least 1.
        confidence: that all of them hold.
    Raises:
        ValueError: no interval.
    """
    if number < 1:
        raise ValueError(f"{number} intervals")
    return 1.0 - (1.0 - confidence) / number
