"""Advantages against leave-one-out written out sample by sample, and what makes the baselines right."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ebft_mega.types import BlockRewards
from tests.unit.reward.rewards import advantages_of, made_rewards, rewards_of

ALIGNMENT_COEF, DIVERSITY_COEF = 0.9, 0.4
shapes = st.tuples(st.integers(1, 2), st.integers(1, 6), st.integers(1, 3))


def random_rewards(shape, seed: int = 0, coefs=(ALIGNMENT_COEF, DIVERSITY_COEF)) -> BlockRewards:
    """Alignment and the diversity that follows from a symmetric matrix of similarities."""
    generator = torch.Generator().manual_seed(seed)
    batch, samples, blocks = shape
    alignment = torch.randn(shape, dtype=torch.float64, generator=generator)
    similarity = torch.randn(batch, blocks, samples, samples, dtype=torch.float64, generator=generator)
    similarity = similarity + similarity.transpose(-1, -2)
    diversity = torch.zeros(shape, dtype=torch.float64)
    if samples > 1:
        others = similarity.sum(dim=-1) - similarity.diagonal(dim1=-2, dim2=-1)
        diversity = (2 * others / (samples - 1)).transpose(1, 2)
    cfm = torch.zeros(batch, blocks, dtype=torch.float64)
    return made_rewards(alignment, diversity, cfm, *coefs)


def advantages(rewards: BlockRewards, estimator: str = "rloo") -> Tensor:
    return advantages_of(rewards, estimator)


@settings(max_examples=50)
@given(shapes, st.integers(0, 1000))
def test_rloo_equals_the_authors_baselines(shape, seed):
    rewards = random_rewards(shape, seed)
    batch, n, blocks = shape
    expected = torch.zeros(shape, dtype=torch.float64)
    for b in range(batch):
        for k in range(blocks):
            a, d = (
                rewards.terms["alignment"].values[b, :, k].tolist(),
                rewards.terms["diversity"].values[b, :, k].tolist(),
            )
            for j in range(n):
                alignment_baseline = (sum(a) - a[j]) / (n - 1) if n > 1 else 0.0
                diversity_baseline = (sum(d) - 2 * d[j]) / (n - 2) if n > 2 else 0.0
                baseline = ALIGNMENT_COEF * alignment_baseline - DIVERSITY_COEF * diversity_baseline
                expected[b, j, k] = rewards.reward[b, j, k] - baseline
    torch.testing.assert_close(advantages(rewards), expected, atol=1e-12, rtol=0)
    if n > 2:
        assert advantages(rewards).sum(dim=1).abs().max() < 1e-12


def test_diversity_advantage_is_larger_than_plain_leave_one_out():
    """By (n - 1) / (n - 2): 1.5 at n = 4. Alignment's is the plain one."""
    for n, ratio in ((3, 2.0), (4, 1.5), (5, 4 / 3)):
        for coefs, name, factor in (((0.0, 1.0), "diversity", ratio), ((1.0, 0.0), "alignment", 1.0)):
            rewards = random_rewards((1, n, 2), coefs=coefs)
            term = rewards.terms[name].coefficient * rewards.terms[name].values
            plain = term - (term.sum(dim=1, keepdim=True) - term) / (n - 1)
            torch.testing.assert_close(advantages(rewards), factor * plain)


@pytest.mark.parametrize("n", [3, 4, 5])
def test_a_rollout_s_baseline_does_not_depend_on_the_rollout(n):
    """Replace one rollout's feature: its reward changes, what is subtracted from it does not."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 1, n + 1, 12, dtype=torch.float64, generator=generator)
    replaced = features.clone()
    replaced[0, 0, 1] = torch.randn(12, dtype=torch.float64, generator=generator)
    rewards, baselines = [], []
    for rows in (features, replaced):
        result = rewards_of(rows @ rows.transpose(-1, -2), "none", ALIGNMENT_COEF, DIVERSITY_COEF)
        rewards.append(result.reward)
        baselines.append(result.reward - advantages(result))
    assert (rewards[0] - rewards[1])[0, 1, 0].abs() > 1e-2
    torch.testing.assert_close(baselines[0][0, 1, 0], baselines[1][0, 1, 0], atol=1e-12, rtol=0)
    assert (baselines[0] - baselines[1])[0, 0, 0].abs() > 1e-3


def test_two_samples_have_no_diversity_baseline():
    rewards = random_rewards((2, 2, 3))
    a = rewards.terms["alignment"].values
    expected = ALIGNMENT_COEF * (a - a.flip(1)) - DIVERSITY_COEF * rewards.terms["diversity"].values
    torch.testing.assert_close(advantages(rewards), expected)


@pytest.mark.parametrize("estimator", ["rloo", "group_norm", "reinforce"])
def test_one_sample_s_advantage_is_its_reward(estimator):
    rewards = random_rewards((2, 1, 3))
    assert torch.equal(advantages(rewards, estimator), rewards.reward)


def test_reinforce_is_the_reward():
    rewards = random_rewards((2, 4, 3))
    assert torch.equal(advantages(rewards, "reinforce"), rewards.reward)


def test_group_norm_standardises_over_the_samples_of_each_block():
    rewards = random_rewards((2, 4, 3))
    result = advantages(rewards, "group_norm")
    for b in range(2):
        for k in range(3):
            r = rewards.reward[b, :, k]
            deviation = ((r - r.mean()).square().sum() / 3).sqrt()
            torch.testing.assert_close(result[b, :, k], (r - r.mean()) / (deviation + 1e-8))


@pytest.mark.parametrize("estimator", ["rloo", "group_norm", "reinforce"])
def test_blocks_and_rows_do_not_mix(estimator):
    rewards = random_rewards((2, 4, 3))
    together = advantages(rewards, estimator)
    for b in range(2):
        for k in range(3):
            part = (slice(b, b + 1), slice(None), slice(k, k + 1))
            terms = (rewards.terms[name].values[part] for name in ("alignment", "diversity"))
            alone = made_rewards(*terms, rewards.cfm[b : b + 1], ALIGNMENT_COEF, DIVERSITY_COEF)
            torch.testing.assert_close(advantages(alone, estimator), together[part], atol=1e-14, rtol=0)


@settings(max_examples=50)
@given(st.integers(3, 6), st.floats(-2, 2), st.floats(-2, 2))
def test_equal_rewards_have_no_advantage_at_all(n, alignment, diversity):
    """Exactly 0, not 1e-17: a mean of n equal numbers is not always that number."""
    shape = (1, n, 1)
    a = torch.full(shape, alignment, dtype=torch.float64)
    d = torch.full(shape, diversity, dtype=torch.float64)
    rewards = made_rewards(a, d, torch.zeros(1, 1, dtype=torch.float64), ALIGNMENT_COEF, DIVERSITY_COEF)
    for estimator in ("rloo", "group_norm"):
        assert advantages(rewards, estimator).eq(0).all()
