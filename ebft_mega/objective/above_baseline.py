"""A term of the reward less its leave-one-out baseline."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ebft_mega.types import TermValues


def above_baseline(term: "TermValues") -> "Tensor":
    """A term minus the baseline that is unbiased for it, without its coefficient.

    Args:
        term: of n >= 2 rollouts.
    Returns:
        float64 [B, n, K]; exactly 0 for equal values of all n >= 3 rollouts of a block.
    Communication: none.
    """
    values, num_samples = term.values, term.values.shape[1]
    # The baseline of `pairs` is twice the mean similarity among the others: d_j - (sum_k d_k - 2 d_j) / (n - 2).
    others = num_samples - (2 if term.baseline == "pairs" else 1)
    if term.baseline == "none" or others == 0:
        return values
    # n * (value - mean); exactly 0 for equal values, which a mean does not give
    return (values[:, :, None] - values[:, None, :]).sum(dim=2) / others
