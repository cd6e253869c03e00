"""Closed forms against explicit whitening in feature space, and the identities that follow from them."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ebft_mega.reward.feature_matching import raw_cosine, unbiased_feature_matching
from tests.unit.reward.naive import CASES, features, gram_of, naive_rewards
from tests.unit.reward.rewards import advantages_of, rewards_of

WHITENINGS = ("none", "sample", "feature")
whitenings = pytest.mark.parametrize("whitening", WHITENINGS)
kinds = pytest.mark.parametrize("kind", ["cosine", "inner_product"])


@kinds
@whitenings
@pytest.mark.parametrize("num_samples", [1, 2, 4, 5])
@pytest.mark.parametrize("case", CASES)
def test_equals_explicit_matrices(case, num_samples, whitening, kind):
    x, y = features(case, num_samples)
    alignment, diversity, cfm = naive_rewards(x, y, whitening, kind)
    rewards = rewards_of(gram_of(x, y), whitening, 0.8, 0.3, kind)
    assert (
        rewards.terms["alignment"].values.shape
        == rewards.terms["diversity"].values.shape
        == rewards.reward.shape
        == (1, num_samples, 1)
    )
    assert rewards.cfm.shape == (1, 1)
    torch.testing.assert_close(rewards.terms["alignment"].values[0, :, 0], alignment, atol=1e-9, rtol=0)
    torch.testing.assert_close(rewards.terms["diversity"].values[0, :, 0], diversity, atol=1e-9, rtol=0)
    torch.testing.assert_close(rewards.cfm[0, 0], cfm, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(rewards.reward[0, :, 0], 0.8 * alignment - 0.3 * diversity, atol=1e-9, rtol=0)


@whitenings
def test_blocks_of_a_batch_do_not_mix(whitening):
    """Every block alone and all in one batch; also pins down which dimension is which."""
    blocks = [[features(case, 4, seed=row) for case in ("random", "pair-equal", "correlated")] for row in (1, 2)]
    gram = torch.cat([torch.cat([gram_of(*block) for block in row], dim=1) for row in blocks])
    together = rewards_of(gram, whitening, 1.0, 0.5)
    assert together.terms["alignment"].values.shape == (2, 4, 3) and together.cfm.shape == (2, 3)
    for row, block in itertools.product(range(2), range(3)):
        alone = rewards_of(gram_of(*blocks[row][block]), whitening, 1.0, 0.5)
        pairs = [(together.terms[name].values, alone.terms[name].values) for name in ("alignment", "diversity")]
        for found, expected in (*pairs, (together.reward, alone.reward)):
            torch.testing.assert_close(found[row, :, block], expected[0, :, 0], atol=1e-12, rtol=0)
        torch.testing.assert_close(together.cfm[row, block], alone.cfm[0, 0])


@kinds
@whitenings
def test_features_of_length_sqrt_3(whitening, kind):
    """Per-layer normalisation: the cosine takes the length out, the plain inner product keeps it."""
    x, y = features("correlated", 4)
    long = [3**0.5 * value for value in (x, y)]
    alignment, diversity, cfm = naive_rewards(*long, whitening, kind)
    rewards = rewards_of(gram_of(*long), whitening, 1.0, 1.0, kind)
    torch.testing.assert_close(rewards.terms["alignment"].values[0, :, 0], alignment, atol=1e-9, rtol=0)
    torch.testing.assert_close(rewards.terms["diversity"].values[0, :, 0], diversity, atol=1e-9, rtol=0)
    torch.testing.assert_close(rewards.cfm[0, 0], cfm, atol=1e-9, rtol=0)
    if whitening == "none":
        short = rewards_of(gram_of(x, y), whitening, 1.0, 1.0, kind)
        factor = 1 if kind == "cosine" else 3
        torch.testing.assert_close(rewards.terms["alignment"].values, factor * short.terms["alignment"].values)
        torch.testing.assert_close(rewards.terms["diversity"].values, 3 * short.terms["diversity"].values)


def test_near_duplicates_stay_apart_and_duplicates_do_not():
    """The singular values' tolerance 1e-5 separates a relative distance of 1e-3 from equality."""
    x, y = features("random", 4)
    near = x.clone()
    near[1] = near[0] + 1e-3 * x[1]
    diversity = rewards_of(gram_of(near, y), "sample", 1.0, 1.0).terms["diversity"].values[0, :, 0]
    assert diversity.abs().max() < 1e-6
    alignment, _, _ = naive_rewards(near, y, "sample")
    torch.testing.assert_close(
        rewards_of(gram_of(near, y), "sample", 1.0, 1.0).terms["alignment"].values[0, :, 0],
        alignment,
        atol=1e-6,
        rtol=0,
    )
    near[1] = near[0] + 1e-7 * x[1]  # below the tolerance: counts as equal
    diversity = rewards_of(gram_of(near, y), "sample", 1.0, 1.0).terms["diversity"].values[0, :, 0]
    torch.testing.assert_close(diversity[:2], torch.full((2,), 1 / 3, dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("whitening", ["sample", "feature"])
def test_whitened_diversity_is_a_duplicate_penalty(whitening):
    def diversity(case, num_samples):
        return rewards_of(gram_of(*features(case, num_samples)), whitening, 1.0, 1.0).terms["diversity"].values[0, :, 0]

    assert diversity("random", 4).abs().max() < 1e-12
    for n in (3, 4, 5):
        pair = diversity("pair-equal", n)  # m = 2 of n: (m - 1) / (m (n - 1)), times 2
        torch.testing.assert_close(pair[[0, -1]], torch.full((2,), 1 / (n - 1), dtype=torch.float64))
        assert pair[1:-1].abs().max() < 1e-12
        same = diversity("all-equal", n)
        torch.testing.assert_close(same, torch.full((n,), 2 / n, dtype=torch.float64))


def test_sample_alignment_is_the_share_of_the_target_that_rollouts_explain():
    """Sum of squared raw alignments = R^2 of the target's least-squares fit on the rollouts."""
    for n in (1, 2, 4, 5):
        x, y = features("correlated", n)
        fit = torch.linalg.lstsq(x.T, y[:, None]).solution[:, 0]
        explained = 1 - (y - fit @ x).square().sum() / y.square().sum()
        raw = rewards_of(gram_of(x, y), "sample", 1.0, 1.0).terms["alignment"].values[0, :, 0] / 2
        assert raw.square().sum().item() == pytest.approx(explained.item(), abs=1e-12)
        assert 0.01 < explained < 0.9999


def test_feature_alignment_is_a_competition_within_the_group():
    """Sum of squared raw alignments = 1 however near they are; a rollout equal to the target takes all."""
    for case in ("random", "correlated"):
        raw = rewards_of(gram_of(*features(case, 4)), "feature", 1.0, 1.0).terms["alignment"].values[0, :, 0] / 2
        assert raw.square().sum().item() == pytest.approx(1.0, abs=1e-12)
    raw = rewards_of(gram_of(*features("one-is-target", 4)), "feature", 1.0, 1.0).terms["alignment"].values[0, :, 0] / 2
    torch.testing.assert_close(raw, torch.tensor([0, 0, 1, 0], dtype=torch.float64), atol=1e-12, rtol=0)


def test_the_authors_sign_is_kept():
    """With few feature dimensions c_j = (W 1)_j may be negative and flips that rollout's alignment."""
    seen = False
    for seed in range(100):
        x, y = features("random", 4, seed=seed, size=4)
        u, s, _ = torch.linalg.svd(x)
        if (u @ torch.diag(1 / s) @ u.T).sum(dim=1).min() < -0.1:
            seen = True
            expected = naive_rewards(x, y, "sample")[0]
            ours = rewards_of(gram_of(x, y), "sample", 1.0, 1.0).terms["alignment"].values[0, :, 0]
            torch.testing.assert_close(ours, expected, atol=1e-7, rtol=0)
    assert seen


@whitenings
@pytest.mark.parametrize("num_samples", [3, 4, 5])
def test_equal_rollouts_get_equal_rewards_to_the_last_bit(whitening, num_samples):
    for seed in range(20):
        gram = gram_of(*features("all-equal", num_samples, seed))
        rewards = rewards_of(gram, whitening, 1.0, 0.7)
        assert rewards.reward.unique().numel() == 1
        assert advantages_of(rewards, "rloo").eq(0).all()
        pair = rewards_of(gram_of(*features("pair-equal", num_samples, seed)), whitening, 1.0, 0.7)
        assert torch.equal(pair.reward[0, 0, 0], pair.reward[0, -1, 0])


@whitenings
def test_zero_features_give_zero_and_nothing_is_not_a_number(whitening):
    gram = torch.zeros(1, 2, 5, 5, dtype=torch.float64)
    gram[0, 1, -1, -1] = 1.0  # zero rollouts, a target of length one
    rewards = rewards_of(gram, whitening, 1.0, 1.0)
    for value in (rewards.terms["alignment"].values, rewards.terms["diversity"].values, rewards.reward):
        assert value.eq(0).all()
    assert rewards.cfm[0, 0] == 0
    assert rewards.cfm[0, 1] == (1 if whitening == "none" else 0)
    assert raw_cosine(gram).eq(0).all()


@settings(max_examples=40)
@given(st.sampled_from(WHITENINGS), st.permutations(range(4)), st.integers(0, 1000))
def test_order_of_samples_does_not_matter(whitening, order, seed):
    x, y = features("correlated", 4, seed)
    rewards = rewards_of(gram_of(x, y), whitening, 1.0, 0.5)
    permuted = rewards_of(gram_of(x[order], y), whitening, 1.0, 0.5)
    torch.testing.assert_close(permuted.reward, rewards.reward[:, order], atol=1e-9, rtol=0)
    torch.testing.assert_close(permuted.cfm, rewards.cfm, atol=1e-9, rtol=1e-9)


@settings(max_examples=40)
@given(st.sampled_from(WHITENINGS), st.integers(1, 6), st.integers(0, 1000), st.floats(0.01, 100))
def test_alignment_is_bounded_and_free_of_scale(whitening, n, seed, scale):
    x, y = features("random", n, seed)
    rewards = rewards_of(gram_of(x, y), whitening, 1.0, 1.0)
    assert rewards.terms["alignment"].values.abs().max() <= 2 + 1e-12
    assert rewards.cfm.min() >= 0
    scaled = rewards_of(gram_of(scale * x, scale * y), whitening, 1.0, 1.0)
    torch.testing.assert_close(scaled.terms["alignment"].values, rewards.terms["alignment"].values, atol=1e-7, rtol=0)


def test_raw_cosine():
    x, y = features("correlated", 4)
    gram = gram_of(x * torch.tensor([[1.0], [2.0], [0.5], [1.0]]), 3 * y)
    torch.testing.assert_close(raw_cosine(gram)[0, :, 0], x @ y)
    assert raw_cosine(gram).shape == (1, 4, 1)


def test_unbiased_feature_matching_has_the_right_mean():
    """All n-tuples of draws from a small distribution, weighted by their probability."""
    support, y = features("random", 3)
    probabilities = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    truth = (probabilities @ support - y).square().sum()
    for n in (2, 3):
        mean, biased = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for draw in itertools.product(range(3), repeat=n):
            weight = probabilities[list(draw)].prod()
            gram = gram_of(support[list(draw)], y)
            mean += weight * unbiased_feature_matching(gram)[0, 0]
            biased += weight * rewards_of(gram, "none", 1.0, 1.0).cfm[0, 0]
        torch.testing.assert_close(mean, truth)
        assert biased > truth + 0.1


def test_unbiased_feature_matching_of_unit_features_is_one_minus_the_effective_reward():
    gram = gram_of(*features("correlated", 4))
    rewards = rewards_of(gram, "none", 1.0, 1.0)
    effective = (rewards.terms["alignment"].values - rewards.terms["diversity"].values / 2).mean()
    torch.testing.assert_close(unbiased_feature_matching(gram)[0, 0], 1 - effective)


def test_unbiased_feature_matching_needs_two_samples():
    with pytest.raises(ValueError, match="two samples"):
        unbiased_feature_matching(gram_of(*features("random", 1)))


def test_low_precision_grams_and_unknown_whitenings_are_refused():
    gram = gram_of(*features("random", 4))
    with pytest.raises(TypeError, match="float64"):
        rewards_of(gram.float(), "sample", 1.0, 1.0)
    with pytest.raises(ValueError, match="whitening"):
        rewards_of(gram, "zca", 1.0, 1.0)
