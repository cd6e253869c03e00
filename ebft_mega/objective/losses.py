"""The loss of a step: exact global means, whatever the micro-batches and ranks."""

import torch
from torch import Tensor

from ebft_mega.rollout.plan import BlockPlan
from ebft_mega.types import LossTerms, PolicyLogprobs, TokenCounts


def count_tokens(plan: BlockPlan, global_batch_size: int, rl_coef: float, ce_coef: float) -> TokenCounts:
    """Denominators of a step, known before its first forward.

    Every row has the same geometry, so the counts are those of a row times the rows of the global batch.
    """
    return TokenCounts(
        rollout_tokens=global_batch_size * plan.generated_per_row if rl_coef > 0 else 0,
        target_tokens=global_batch_size * (plan.sequence_length - 1) if ce_coef > 0 else 0,
    )


def loss_terms(
    logprobs: PolicyLogprobs, advantages: Tensor | None, counts: TokenCounts, rl_coef: float, ce_coef: float
) -> LossTerms:
    """A micro-batch's share of the step's losses; shares add up over micro-batches and ranks.

    rl is the mean over generated tokens of -advantage * logprob, ce the mean over all P - 1 next-token positions of
    -logprob; total = rl_coef * rl + ce_coef * ce.

    Args:
        advantages: [B, n, K], without gradient; None when rl_coef is 0.
    Communication: none.
    Source: EBFT paper (arXiv 2603.12248); REINFORCE with one update per rollout, so the policy ratio is 1.
    """
    present = [values for values in (logprobs.rollout, logprobs.target) if values is not None]
    zero = present[0].new_zeros(())
    rl = ce = zero
    if logprobs.rollout is not None and advantages is not None:
        weights = advantages.detach().to(logprobs.rollout.dtype)[..., None]
        rl = -(weights * logprobs.rollout).sum() / counts.rollout_tokens
    if logprobs.target is not None:
        ce = -logprobs.target.sum() / counts.target_tokens
    return LossTerms(rl=rl.detach(), ce=ce.detach(), total=torch.add(rl_coef * rl, ce_coef * ce))
