"""The loss: policy gradient, cross-entropy, less entropy; each micro-batch's sum divided by the global token count."""

from torch import Tensor

from ebft_mega.block_plan import BlockPlan
from ebft_mega.types import LossTerms, PolicyLogprobs, TokenCounts


def count_tokens(
    plan: BlockPlan,
    num_rows: int,
    rl_coef: float,
    ce_coef: float,
    num_blocks: int | None = None,
    num_targets: int | None = None,
    entropy_coef: float = 0.0,
) -> TokenCounts:
    """Denominators of a step's losses, over the global batch.

    Known before the first forward, so no share has to be rescaled by how a micro-batch or a rank was filled.

    Args:
        num_rows: rows of the step that count, over all ranks.
        rl_coef, ce_coef, entropy_coef: a term with coefficient 0 is not computed and counts no tokens.
        num_blocks: blocks that count, over all ranks; None: all of those rows.
        num_targets: next-token positions that count, over all ranks; None: all P - 1 of those rows, also those at
            which another document begins.
    Returns:
        TokenCounts: every generated token of those blocks, and those next-token positions.
    """
    if num_targets is None:
        num_targets = num_rows * (plan.sequence_length - 1)
    if num_blocks is None:
        num_blocks = num_rows * plan.num_blocks
    return TokenCounts(
        rollout_tokens=num_blocks * plan.num_samples * plan.generate_length if rl_coef else 0,
        target_tokens=num_targets if ce_coef or entropy_coef else 0,
    )


def loss_terms(
    logprobs: PolicyLogprobs,
    advantages: Tensor | None,
    counts: TokenCounts,
    rl_coef: float,
    ce_coef: float,
    counted_rows: Tensor | None = None,
    counted_blocks: Tensor | None = None,
    counted_targets: Tensor | None = None,
    entropy_coef: float = 0.0,
) -> LossTerms:
    """A micro-batch's share of the step's losses.

    rl = mean over generated tokens of -advantage * logprob; its gradient is that of REINFORCE (one update per
    rollout, so the policy ratio of the authors' code is 1 and only its gradient matters). With a token critic the mean
    of -(advantage * logprob + expected value).
    ce = mean over next-token positions of -logprob; entropy = mean over the same positions of the entropy, subtracted.

    Args:
        logprobs: of the micro-batch; a term whose log-probabilities are None is 0.
        advantages: float64 [B, n, K], the same for all tokens of a rollout, or [B, n, K, G]; constants, no gradient
            flows into them; 0 where a block does not count. Needed with `logprobs.rollout`.
        counts: denominators over the global batch; a term that nothing counts in is 0.
        rl_coef, ce_coef: weights of the two terms; entropy_coef: of the entropies, which are then needed.
        counted_rows: bool [B], rows whose targets count; None: all.
        counted_blocks: bool [B, K], blocks whose rollouts count; None: all. What does not count may be anything: NaN
            times an advantage of 0 would be NaN.
        counted_targets: bool [B, P - 1], next-token positions that count, only of rows that do; None: all of them.
    Returns:
        LossTerms in the log-probabilities' dtype (float32), scalars; `total` has the gradient, the others
        are values only. The shares of all micro-batches of all ranks sum to the step's losses.
    Raises:
        ValueError: when there is nothing to learn from, or rollouts come without advantages.
    Communication: none.
    Source: EBFT paper (arXiv 2603.12248), objective.
    """
    shares: list[Tensor] = []
    rl = ce = entropy = None
    if logprobs.rollout is not None:
        if advantages is None:
            raise ValueError("log-probabilities of rollouts need the rollouts' advantages")
        rl = -_gained(logprobs.rollout, advantages, logprobs.expected_values, counted_blocks)
        rl = rl / max(counts.rollout_tokens, 1)
        shares.append(rl_coef * rl)
    if logprobs.target is not None:
        ce = -_counted(logprobs.target, counted_rows, counted_targets).sum() / max(counts.target_tokens, 1)
        if ce_coef or logprobs.entropies is None:
            shares.append(ce_coef * ce)
    if logprobs.entropies is not None:
        entropy = _counted(logprobs.entropies, counted_rows, counted_targets).sum() / max(counts.target_tokens, 1)
        shares.append(-entropy_coef * entropy)
    if not shares:
        raise ValueError("neither rollouts nor targets to learn from")
    total = sum(shares[1:], start=shares[0])
    zero = total.detach().new_zeros(())
    rl, ce = (zero if value is None else value.detach() for value in (rl, ce))
    return LossTerms(rl, ce, total, None if entropy is None else entropy.detach())


def _counted(values: Tensor, counted_rows: Tensor | None, counted_targets: Tensor | None) -> Tensor:
    """Values of next-token positions [B, P - 1], 0 where they do not count."""
    if counted_targets is not None:
        return values.masked_fill(~counted_targets, 0.0)
    return values if counted_rows is None else values.masked_fill(~counted_rows[:, None], 0.0)


def _gained(rollout: Tensor, advantages: Tensor, expected: Tensor | None, counted_blocks: Tensor | None) -> Tensor:
    """The sum over counted blocks of advantage * log-probability, and of the critic's expected values."""
    weights = advantages.detach().to(rollout.dtype)
    if weights.dim() == 3:
        weights = weights[..., None]
    if counted_blocks is not None:
        rollout = rollout.masked_fill(~counted_blocks[:, None, :, None], 0.0)
    gained = (weights * rollout).sum()
    return gained if expected is None else gained + expected
