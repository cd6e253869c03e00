"""Leave-one-out baselines."""

from typing import TYPE_CHECKING

from ebft_mega.extension.advantage_estimator import AdvantageEstimator, EstimatorInputs

if TYPE_CHECKING:
    from torch import Tensor

    from ebft_mega.types import TermValues


class Rloo(AdvantageEstimator):
    """Subtracts from each reward term what it would be expected to be without the rollout (EBFT paper, equation 94).

    For a term of each rollout by itself that is the mean of the others. A rollout's diversity is the mean similarity to
    the others, so the others' own diversity contains their similarity to this rollout; the baseline leaves those pairs
    out, or it would depend on what it is the baseline of (and shrink the diversity's advantage to (n - 2) / (n - 1)).

    Follows delta |E phi|^2 - alpha E a, of which the mean gradient is the gradient divided by G: phi is a rollout's
    feature, a its alignment term, delta and alpha the coefficients, E over the policy at the sampling temperature. With
    `ebft.alignment: inner_product` and coefficients of 1 that is feature matching, |E phi - y|^2 but for a constant.
    Whitened rewards follow no objective, and neither do rollouts of a nucleus (docs/numerics.md).

    With one rollout there is nothing to compare with and the advantage is the reward; with two, no pair is left to make
    a diversity baseline of, and that term has none.
    """

    name = "rloo"
    leaves_the_mean = True

    def advantages(self, inputs: EstimatorInputs) -> "Tensor":
        """Float64 [B, n, K]; exactly 0 for equal rewards of all n >= 3 rollouts of a block."""
        rewards = inputs.rewards
        if rewards.reward.shape[1] == 1:
            return rewards.reward
        first, *others = (term.coefficient * above_baseline(term) for term in rewards.terms.values())
        total = first
        for other in others:
            total = total + other
        return total


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
