"""Settings of the token critic, which an estimator that reads one chooses. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CriticSettings:
    """How the token critic is fitted and used (`ebft_mega/critic/`)."""

    rank: int = 64  # r, numbers of a token's vector; at most the hidden size is used
    decay: float = 0.95  # of the statistics, with each step
    prefix_ridge: float = 0.1  # of the regression on the prefix, times the mean of its squares
    token_ridge: float = 0.02  # of the regression on the token that was drawn
    # How much of the others' mean is a rollout's baseline, beside the prediction from its prefix; None: a half where
    # the feature is a mean of tokens, else nothing.
    leave_one_out_share: float | None = None
    warmup_batches: int = 4  # batches that it is fitted on before it is used
