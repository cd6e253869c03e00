"""Baselines that others propose, made unbiased here, to compare with the product's estimators on the same rollouts.

Both are weighted means of what the other rollouts of a block would have been worth without the rollout whose baseline
it is; the weights may depend on that rollout's tokens before the one that is judged, but not on what follows. So the
advantages have the mean of `rloo` with inner products, for n >= 3.
"""

from typing import cast

import torch
from torch import Tensor

from ebft_mega.block_plan import BlockPlan
from ebft_mega.model.head import ScoredTokens
from ebft_mega.model.stage import Stage
from ebft_mega.rollout.score import ScoreRequest, score


def advantages_over(weights: Tensor, gram: Tensor, alignment_coef: float, diversity_coef: float) -> Tensor:
    """Reward less the weighted mean of the other rollouts' rewards, those as they were without the rollout.

    With equal weights it is `rloo`.

    Args:
        weights: of rollout k in the baseline of token t of rollout j, float64 [B, K, n (j), n (k), G], at least 0.
            Where all others have none, they count alike.
        gram: inner products of unwhitened features, float64 [B, K, n + 1, n + 1].
    Returns:
        float64 [B, n, K, G].
    Communication: none.
    """
    num_samples = gram.shape[-1] - 1
    similar, target = gram[..., :-1, :-1], gram[..., :-1, -1]
    own = similar.diagonal(dim1=-2, dim2=-1)
    to_others = similar.sum(dim=-1) - own  # [B, K, n]
    reward = 2 * (alignment_coef * target - diversity_coef / (num_samples - 1) * to_others)
    left = (to_others[..., None, :] - similar) / (num_samples - 2)  # of k with all but j, [B, K, j, k]
    without = 2 * (alignment_coef * target[..., None, :] - diversity_coef * left)
    others = (1 - torch.eye(num_samples, dtype=weights.dtype, device=gram.device))[..., None]
    weights = weights * others
    weights = torch.where(weights.sum(dim=-2, keepdim=True) > 0, weights, others)
    baseline = (weights * without[..., None]).sum(dim=-2) / weights.sum(dim=-2)  # [B, K, j, G]
    return (reward[..., None] - baseline).transpose(1, 2)


def optimal_token_weights(logprobs: Tensor, squared_probabilities: Tensor) -> Tensor:
    """Weights of the optimal token baseline: each rollout's squared gradient of the logits so far.

    Of one token it is 1 - 2 pi(x) + sum over v of pi(v)^2.

    Args:
        logprobs: of the rollouts' tokens, [B, n, K, G].
        squared_probabilities: sum over the vocabulary, [B, n, K, G].
    Returns:
        float64 [B, K, n, n, G], the same for every rollout whose baseline it is.
    Communication: none.
    Source: "The optimal token baseline" (arXiv 2602.07078), with its logit-gradient proxy.
    """
    squares = 1 - 2 * logprobs.to(torch.float64).exp() + squared_probabilities.to(torch.float64)
    so_far = squares.clamp(min=0).cumsum(dim=-1).transpose(1, 2)  # [B, K, n, G]
    return so_far[:, :, None].expand(-1, -1, so_far.shape[2], -1, -1)


def prefix_weights(tokens: Tensor) -> Tensor:
    """Weights of prefix values: the rollouts that share what a rollout has drawn before a token count, others do not.

    Where no other one shares all of it, those count that share the most.

    Args:
        tokens: int64 [B, n, K, G].
    Returns:
        float64 [B, K, n, n, G].
    Communication: none.
    Source: "Exploiting tree structure for credit assignment" (arXiv 2509.18314), its prefix values, without the
        rollout's own outcome.
    """
    of_blocks = tokens.transpose(1, 2)  # [B, K, n, G]
    equal = (of_blocks[:, :, :, None] == of_blocks[:, :, None]).to(torch.float64)
    shared = torch.cat((torch.ones_like(equal[..., :1]), equal.cumprod(dim=-1)[..., :-1]), dim=-1)
    shared = shared * ~torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)[..., None]
    for t in range(1, shared.shape[-1]):
        alone = shared[..., t].sum(dim=-1, keepdim=True) == 0
        shared[..., t] = torch.where(alone, shared[..., t - 1], shared[..., t])
    return shared


@torch.no_grad()
def squared_probabilities(stage: Stage, request: ScoreRequest, plan: BlockPlan) -> Tensor:
    """The sum over the vocabulary of squared probabilities before each token of the rollouts.

    Args:
        stage: the whole model, on one rank.
        request: with rollouts alone.
    Returns:
        float32 [B, n, K, G].
    Communication: none.
    """
    (found,) = score(cast(Stage, _SquaredProbabilities(stage)), request, plan)
    return found


class _SquaredProbabilities:
    """A stage that says of each scored token how concentrated the distribution is that it was drawn from."""

    def __init__(self, stage: Stage):
        self._stage = stage

    def __getattr__(self, name: str) -> object:
        return getattr(self._stage, name)

    def logprobs(self, rows: Tensor, scored: ScoredTokens) -> Tensor:
        """float32 [rows, choices], instead of log-probabilities."""
        logits = self._stage.logits(rows)[:, : self._stage.architecture.vocab_size]
        softmax = (logits.float() / scored.temperature[:, None].float()).softmax(dim=-1)
        return softmax.square().sum(dim=-1, keepdim=True).expand(scored.tokens.shape)
