"""Equal rollouts: found by tokens, given one set of inner products, counted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import integers

from ebft_mega.reward.duplicates import (
    copy_duplicate_rows,
    duplicate_share,
    duplicate_share_per_row,
    first_equal,
)
from tests.unit.reward.rewards import advantages_of, rewards_of

shapes = st.tuples(integers(1, 2), integers(1, 5), integers(1, 3), integers(1, 3))


def random_rollouts(shape, seed: int) -> torch.Tensor:
    """Two token ids only, so that many rollouts are equal."""
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed))


def noisy_grams(rollouts: torch.Tensor, seed: int) -> torch.Tensor:
    """[B, K, n + 1, n + 1] as a low-precision kernel leaves them: not symmetric, equal rollouts not equal."""
    batch, samples, blocks, _ = rollouts.shape
    generator = torch.Generator().manual_seed(seed)
    size = (batch, blocks, samples + 1, samples + 1)
    return torch.randn(size, dtype=torch.float64, generator=generator)


@settings(max_examples=60)
@given(shapes, st.integers(0, 10_000))
def test_equals_loops(shape, seed):
    rollouts = random_rollouts(shape, seed)
    gram = noisy_grams(rollouts, seed)
    copied = copy_duplicate_rows(gram, rollouts)
    batch, samples, blocks, _ = shape
    with_duplicates = 0
    for b in range(batch):
        for k in range(blocks):
            sequences = [tuple(rollouts[b, j, k].tolist()) for j in range(samples)]
            source = [sequences.index(sequence) for sequence in sequences] + [samples]
            with_duplicates += len(set(sequences)) < samples
            for i in range(samples + 1):
                for j in range(samples + 1):
                    one, other = gram[b, k, source[i], source[j]], gram[b, k, source[j], source[i]]
                    assert copied[b, k, i, j] == (one + other) / 2
    assert torch.equal(copied, copied.transpose(-1, -2))
    assert duplicate_share(rollouts).item() == pytest.approx(with_duplicates / (batch * blocks))
    assert duplicate_share_per_row(rollouts).shape == (batch,)
    torch.testing.assert_close(duplicate_share_per_row(rollouts).mean(), duplicate_share(rollouts))


def test_share_per_row():
    rollouts = torch.tensor([[[[1, 2], [3, 4]], [[1, 2], [4, 3]]], [[[0, 1], [5, 5]], [[1, 0], [5, 6]]]])
    assert rollouts.shape == (2, 2, 2, 2)
    assert duplicate_share_per_row(rollouts).tolist() == [0.5, 0.0]
    assert duplicate_share(rollouts).item() == 0.25
    assert duplicate_share(rollouts[:, :1]).item() == 0.0


def test_symmetric_grams_without_duplicates_stay_as_they_are():
    features = torch.randn(2, 3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = features @ features.transpose(-1, -2)
    gram = (gram + gram.transpose(-1, -2)) / 2
    rollouts = torch.arange(4)[None, :, None, None].expand(2, 4, 3, 2)
    assert torch.equal(copy_duplicate_rows(gram, rollouts), gram)


def test_rounding_between_equal_rollouts_is_repaired():
    """Features of equal rollouts that differ by float32 rounding would lose the whole duplicate penalty."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 1, 5, 64, dtype=torch.float64, generator=generator)
    features[0, 0, 3] = features[0, 0, 1] * (1 + 1e-4 * torch.randn(64, generator=generator))
    features = features / features.norm(dim=-1, keepdim=True)
    gram = features @ features.transpose(-1, -2)
    rollouts = torch.tensor([[0, 1], [2, 3], [4, 5], [2, 3]])[None, :, None]
    assert rewards_of(gram, "sample", 1.0, 1.0).terms["diversity"].values.abs().max() < 1e-6
    repaired = rewards_of(copy_duplicate_rows(gram, rollouts), "sample", 1.0, 1.0)
    expected = torch.tensor([0, 1 / 3, 0, 1 / 3], dtype=torch.float64)
    torch.testing.assert_close(repaired.terms["diversity"].values[0, :, 0], expected, atol=1e-12, rtol=0)


def test_groups_of_equal_rollouts_have_no_advantage():
    features = torch.randn(2, 3, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rollouts = torch.full((2, 4, 3, 2), 7)
    gram = copy_duplicate_rows(features @ features.transpose(-1, -2), rollouts)
    for whitening in ("none", "sample", "feature"):
        rewards = rewards_of(gram, whitening, 1.0, 0.5)
        assert advantages_of(rewards, "rloo").eq(0).all()
        assert advantages_of(rewards, "group_norm").eq(0).all()


def test_rows_that_are_not_numbers_are_nobody_s_duplicates():
    """A diverged block must show up as such, not take over another rollout's numbers."""
    rows = torch.tensor([[1.0, 2.0], [torch.nan, 1.0], [1.0, 2.0], [torch.nan, 1.0]])
    assert first_equal(rows).tolist() == [0, 1, 0, 3]
