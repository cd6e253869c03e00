"""Losses: their values, their gradients, and that shares of micro-batches add up."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ebft_mega.block_plan import BlockPlan
from ebft_mega.objective.losses import count_tokens, loss_terms
from ebft_mega.types import PolicyLogprobs, TokenCounts

PLAN = BlockPlan(12, 2, 4, 2, 3)  # K = 4
NUM_ROWS, VOCABULARY, TEMPERATURE = 5, 11, 0.6
RL_COEF, CE_COEF = 0.7, 0.3
COUNTS = count_tokens(PLAN, NUM_ROWS, RL_COEF, CE_COEF)


def random_case(seed: int = 0, dtype: torch.dtype = torch.float64):
    """Logits and tokens of rollouts and targets of a global batch, and advantages."""
    generator = torch.Generator().manual_seed(seed)
    shape = (NUM_ROWS, PLAN.num_samples, PLAN.num_blocks, PLAN.generate_length)
    rollout_logits = torch.randn(*shape, VOCABULARY, dtype=dtype, generator=generator).requires_grad_()
    target_logits = torch.randn(NUM_ROWS, 11, VOCABULARY, dtype=dtype, generator=generator).requires_grad_()
    rollouts = torch.randint(0, VOCABULARY, shape, generator=generator)
    targets = torch.randint(0, VOCABULARY, (NUM_ROWS, 11), generator=generator)
    advantages = torch.randn(shape[:-1], dtype=torch.float64, generator=generator)
    return rollout_logits, target_logits, rollouts, targets, advantages


def logprobs_of(rollout_logits, target_logits, rollouts, targets) -> PolicyLogprobs:
    return PolicyLogprobs(
        (rollout_logits / TEMPERATURE).log_softmax(dim=-1).gather(-1, rollouts[..., None])[..., 0],
        target_logits.log_softmax(dim=-1).gather(-1, targets[..., None])[..., 0],
    )


def test_counts():
    assert PLAN.num_blocks == 4
    assert TokenCounts(5 * 3 * 4 * 2, 5 * 11) == COUNTS
    assert count_tokens(PLAN, 5, 0.0, 1.0) == TokenCounts(0, 55)
    assert count_tokens(PLAN, 5, 1.0, 0.0) == TokenCounts(120, 0)
    assert count_tokens(PLAN, 5, 1.0, 0.0, entropy_coef=0.1) == TokenCounts(120, 55)


@pytest.mark.parametrize("by_token", [False, True])
def test_values_and_gradients_equal_sums_written_out(by_token):
    *logits, rollouts, targets, advantages = random_case()
    if by_token:
        weights = torch.tensor([2.0, -0.5], dtype=torch.float64)
        advantages = advantages[..., None] * weights
    terms = loss_terms(logprobs_of(*logits, rollouts, targets), advantages, COUNTS, RL_COEF, CE_COEF)
    ours = torch.autograd.grad(terms.total, logits)

    rl, ce = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in rollouts.shape)).tolist():
        row = tuple(index)
        scores = torch.log_softmax(logits[0][row] / TEMPERATURE, dim=-1)
        rl = rl - advantages[row if by_token else row[:-1]] * scores[rollouts[row]]
    for row in range(NUM_ROWS):
        for position in range(11):
            scores = torch.log_softmax(logits[1][row, position], dim=-1)
            ce = ce - scores[targets[row, position]]
    rl, ce = rl / rollouts.numel(), ce / targets.numel()
    expected = torch.autograd.grad(RL_COEF * rl + CE_COEF * ce, logits)
    torch.testing.assert_close(terms.rl, rl.detach())
    torch.testing.assert_close(terms.ce, ce.detach())
    torch.testing.assert_close(terms.total, RL_COEF * rl + CE_COEF * ce)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-14, rtol=1e-9)
    assert not terms.rl.requires_grad and not terms.ce.requires_grad


def test_gradient_of_a_token_is_that_of_the_softmax_at_temperature():
    """d(-A log p) / d logits = A (p - onehot) / temperature / tokens, in closed form."""
    *logits, rollouts, targets, advantages = random_case()
    terms = loss_terms(logprobs_of(*logits, rollouts, targets), advantages, COUNTS, 1.0, 0.0)
    (gradient,) = torch.autograd.grad(terms.total, logits[0])
    probabilities = (logits[0] / TEMPERATURE).softmax(dim=-1)
    onehot = torch.nn.functional.one_hot(rollouts, VOCABULARY)
    expected = advantages[..., None, None] * (probabilities - onehot) / TEMPERATURE / rollouts.numel()
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("coefficients", [(0.7, 0.3), (0.7, 0.0), (0.0, 0.3)])
@pytest.mark.parametrize("masked", [None, "rows", "targets"])
def test_entropies_are_subtracted_over_what_the_cross_entropy_counts(coefficients, masked):
    *logits, rollouts, targets, advantages = random_case()
    rl_coef, ce_coef = coefficients
    logprobs = logits[1].log_softmax(dim=-1)
    ours = replace(logprobs_of(*logits, rollouts, targets), entropies=-(logprobs.exp() * logprobs).sum(dim=-1))
    if not rl_coef:
        ours = replace(ours, rollout=None)
    counted = torch.ones(NUM_ROWS, 11, dtype=torch.bool)
    masks = {}
    if masked == "rows":
        counted[1:3] = False
        masks = {"counted_rows": counted[:, 0]}
    elif masked:
        counted[1, 2:5] = counted[4] = False
        masks = {"counted_rows": counted[:, 0], "counted_targets": counted}
    entropy = ours.entropies[counted].mean()
    ours = replace(ours, entropies=ours.entropies.masked_fill(~counted, torch.nan))  # may be anything
    counts = count_tokens(PLAN, NUM_ROWS, rl_coef, ce_coef, num_targets=int(counted.sum()), entropy_coef=0.2)
    assert counts.target_tokens == counted.sum()
    terms = loss_terms(ours, advantages, counts, rl_coef, ce_coef, **masks, entropy_coef=0.2)
    torch.testing.assert_close(terms.entropy, entropy.detach())
    expected = rl_coef * terms.rl + ce_coef * terms.ce - 0.2 * terms.entropy
    torch.testing.assert_close(terms.total.detach(), expected)
    torch.testing.assert_close(terms.ce, -ours.target[counted].mean().detach())
    plain = loss_terms(replace(ours, entropies=None), advantages, counts, rl_coef, ce_coef, **masks)
    assert plain.entropy is None
    (found,) = torch.autograd.grad(terms.total, logits[1], retain_graph=True)
    (of_entropy,) = torch.autograd.grad(entropy, logits[1], retain_graph=True)
    (of_plain,) = torch.autograd.grad(plain.total, logits[1])
    torch.testing.assert_close(found, of_plain - 0.2 * of_entropy)


@settings(max_examples=20)
@given(st.lists(st.integers(1, NUM_ROWS - 1), max_size=3, unique=True), st.integers(0, 100))
def test_any_split_into_micro_batches_gives_the_same_loss_and_gradient(cuts, seed):
    *logits, rollouts, targets, advantages = random_case(seed)
    logprobs = logprobs_of(*logits, rollouts, targets)
    whole = loss_terms(logprobs, advantages, COUNTS, RL_COEF, CE_COEF)
    expected = torch.autograd.grad(whole.total, logits)

    shares = []
    bounds = [0, *sorted(cuts), NUM_ROWS]
    logprobs = logprobs_of(*logits, rollouts, targets)
    for start, end in zip(bounds, bounds[1:], strict=False):
        rows = slice(start, end)
        part = PolicyLogprobs(logprobs.rollout[rows], logprobs.target[rows])
        shares.append(loss_terms(part, advantages[rows], COUNTS, RL_COEF, CE_COEF))
    for name in ("rl", "ce", "total"):
        total = sum(getattr(share, name) for share in shares)
        torch.testing.assert_close(total, getattr(whole, name))
    split = torch.autograd.grad(sum(share.total for share in shares), logits)
    for one, other in zip(split, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_no_gradient_flows_into_advantages():
    *logits, rollouts, targets, advantages = random_case()
    advantages.requires_grad_()
    terms = loss_terms(logprobs_of(*logits, rollouts, targets), advantages, COUNTS, RL_COEF, CE_COEF)
    terms.total.backward()
    assert advantages.grad is None and logits[0].grad is not None


def test_training_s_losses_are_float32():
    *logits, rollouts, targets, advantages = random_case(dtype=torch.float32)
    terms = loss_terms(logprobs_of(*logits, rollouts, targets), advantages, COUNTS, RL_COEF, CE_COEF)
    assert terms.rl.dtype == terms.ce.dtype == terms.total.dtype == torch.float32


def test_one_term_alone():
    *logits, rollouts, targets, advantages = random_case()
    both = logprobs_of(*logits, rollouts, targets)
    rl = loss_terms(PolicyLogprobs(both.rollout, None), advantages, count_tokens(PLAN, 5, 2.0, 0.0), 2.0, 0.0)
    ce = loss_terms(PolicyLogprobs(None, both.target), None, count_tokens(PLAN, 5, 0.0, 3.0), 0.0, 3.0)
    assert rl.ce == 0 and ce.rl == 0
    torch.testing.assert_close(rl.total, 2 * rl.rl)
    torch.testing.assert_close(ce.total, 3 * ce.ce)
    torch.testing.assert_close(ce.ce, -both.target.mean().detach())
    assert rl.total.requires_grad and ce.total.requires_grad


def test_missing_inputs_are_refused():
    *logits, rollouts, targets, _ = random_case()
    logprobs = logprobs_of(*logits, rollouts, targets)
    with pytest.raises(ValueError, match="advantages"):
        loss_terms(logprobs, None, COUNTS, RL_COEF, CE_COEF)
    with pytest.raises(ValueError, match="neither rollouts nor targets"):
        loss_terms(PolicyLogprobs(None, None), None, COUNTS, RL_COEF, CE_COEF)
