"""A value that is not finite marks its block, whatever the operation; all other blocks keep their bits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ebft_mega.reward.duplicates import copy_duplicate_rows, has_duplicates
from ebft_mega.reward.feature_matching import raw_cosine, unbiased_feature_matching
from ebft_mega.reward.marked_blocks import finite_blocks, mark_blocks
from tests.unit.reward.rewards import advantages_of, rewards_of

NOT_FINITE = (math.nan, math.inf, -math.inf)
ROWS, BLOCKS = 2, 3


@st.composite
def spoiled_features(draw):
    """Features [B, K, n + 1, D], the same with some values spoiled, and which blocks still are finite."""
    samples = draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    features = torch.randn(ROWS, BLOCKS, samples + 1, 8, dtype=torch.float64, generator=generator)
    spoiled, finite = features.clone(), torch.ones(ROWS, BLOCKS, dtype=torch.bool)
    for _ in range(draw(st.integers(1, 3))):
        row, block = draw(st.integers(0, ROWS - 1)), draw(st.integers(0, BLOCKS - 1))
        place = row, block, draw(st.integers(0, samples)), draw(st.integers(0, 7))
        spoiled[place] = draw(st.sampled_from(NOT_FINITE))
        finite[row, block] = False
    return features, spoiled, finite


def gram_of(features):
    return features @ features.transpose(-1, -2)


def assert_marked_alone(found, expected, finite):
    """NaN in the marked blocks, the same bits in the others; blocks are the last dimension."""
    by_block = finite if found.dim() == 2 else finite[:, None].expand_as(found)
    assert found[~by_block].isnan().all()
    assert torch.equal(found[by_block], expected[by_block]) and found[by_block].isfinite().all()


@settings(max_examples=60)
@given(spoiled_features(), st.sampled_from(("none", "sample", "feature")))
def test_a_spoiled_feature_marks_its_block_in_every_figure(drawn, whitening):
    features, spoiled, finite = drawn
    gram, healthy = gram_of(spoiled), gram_of(features)
    assert torch.equal(finite_blocks(gram), finite)
    found, expected = (rewards_of(matrix, whitening, 1.0, 0.5) for matrix in (gram, healthy))
    for name in ("alignment", "diversity"):
        assert_marked_alone(found.terms[name].values, expected.terms[name].values, finite)
    assert_marked_alone(found.reward, expected.reward, finite)
    assert_marked_alone(found.cfm, expected.cfm, finite)
    assert_marked_alone(raw_cosine(gram), raw_cosine(healthy), finite)
    if features.shape[2] > 2:
        assert_marked_alone(unbiased_feature_matching(gram), unbiased_feature_matching(healthy), finite)
    for estimator in ("rloo", "group_norm", "reinforce"):
        advantages = (advantages_of(rewards, estimator) for rewards in (found, expected))
        assert_marked_alone(*advantages, finite)


@settings(max_examples=60)
@given(spoiled_features(), st.integers(0, 10_000))
def test_a_rollout_that_takes_over_another_s_feature_still_marks_its_block(drawn, seed):
    features, spoiled, finite = drawn
    shape = ROWS, features.shape[2] - 1, BLOCKS, 1
    rollouts = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed))
    found, expected = (copy_duplicate_rows(gram_of(values), rollouts) for values in (spoiled, features))
    assert torch.equal(finite_blocks(found), finite)
    assert found[~finite].isnan().all() and torch.equal(found[finite], expected[finite])


@pytest.mark.parametrize("value", NOT_FINITE)
def test_the_feature_of_a_second_equal_rollout_is_not_lost(value):
    rollouts = torch.zeros(1, 2, 1, 4, dtype=torch.int64)
    assert has_duplicates(rollouts).all()
    gram = torch.eye(3, dtype=torch.float64)[None, None].clone()
    gram[0, 0, 1, 1] = value
    assert copy_duplicate_rows(gram, rollouts).isnan().all()


def test_marking_touches_no_other_block():
    gram = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    finite = torch.tensor([[True, False], [False, True]])
    marked = mark_blocks(gram, finite)
    assert marked[~finite].isnan().all() and torch.equal(marked[finite], gram[finite])
