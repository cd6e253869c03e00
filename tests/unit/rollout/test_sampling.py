"""Two-level sampling draws from exactly the softmax, and from nothing but the vocabulary."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ebft_mega.rollout.noise import noise_keys
from ebft_mega.rollout.sampling import (
    NUM_VOCABULARY_BLOCKS,
    at_temperature,
    block_scores,
    keep_nucleus,
    sample_tokens,
    token_in_block,
)

NUM_DRAWS = 100_000


def keys_of(count: int, seed: int = 0) -> Tensor:
    return noise_keys(seed, 0, torch.arange(count), 1, 1, 0).flatten()


def random_logits(vocabulary: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 1.5 * torch.randn(vocabulary, generator=generator, dtype=torch.float64).to(dtype)


def assert_draws_follow(tokens: Tensor, probabilities: Tensor) -> None:
    """Pearson's chi-square within four standard deviations of its mean, from both sides.

    Tokens with fewer than 10 expected draws are put together.
    """
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    assert len(counts) == len(probabilities)
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities.double() * len(tokens)
    rare = expected < 10
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    counts, expected = counts[expected > 5], expected[expected > 5]
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    freedom = len(counts) - 1
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5 + 4


# Fewer tokens than blocks, as many, one more, empty blocks at the end, a part-filled last block, many.
@pytest.mark.parametrize("vocabulary", [2, 7, 63, 64, 65, 100, 131, 1000])
def test_draws_follow_the_softmax(vocabulary):
    logits = random_logits(vocabulary, seed=vocabulary)
    tokens = sample_tokens(logits, keys_of(NUM_DRAWS, vocabulary), temperature=0.7, top_p=1.0)
    assert_draws_follow(tokens, (logits / 0.7).softmax(dim=-1))


def test_a_wrong_temperature_would_be_noticed():
    logits = random_logits(131)
    tokens = sample_tokens(logits, keys_of(NUM_DRAWS), temperature=0.7, top_p=1.0)
    with pytest.raises(AssertionError):
        assert_draws_follow(tokens, (logits / 0.72).softmax(dim=-1))


def test_draws_follow_the_nucleus():
    logits = random_logits(131)
    tokens = sample_tokens(logits, keys_of(NUM_DRAWS), temperature=0.7, top_p=0.8)
    probabilities = naive_nucleus((logits / 0.7).softmax(dim=-1), 0.8)
    assert (probabilities == 0).any()
    assert_draws_follow(tokens, probabilities)


def test_samples_of_different_keys_are_independent():
    """Pairs of draws for neighbouring samples, as one variable with 49 values."""
    logits = random_logits(7)
    keys = noise_keys(0, 0, torch.arange(NUM_DRAWS), 2, 1, 0)[..., 0]
    pairs = sample_tokens(logits, keys, 1.0, 1.0)
    probabilities = logits.double().softmax(dim=-1)
    joint = (probabilities[:, None] * probabilities).flatten()
    assert_draws_follow(pairs[:, 0] * 7 + pairs[:, 1], joint)


def test_a_vocabulary_of_one_and_certain_tokens():
    assert sample_tokens(torch.zeros(1), keys_of(1000), 1.0, 1.0).eq(0).all()
    certain = torch.full((130,), -torch.inf)
    for token in (0, 1, 2, 64, 127, 129):
        certain.fill_(-torch.inf)[token] = -3.0
        assert sample_tokens(certain, keys_of(1000), 1.0, 1.0).eq(token).all()


def test_padding_is_never_drawn():
    """Logits far below zero: padding of 0 instead of minus infinity would win at once."""
    for vocabulary in (3, 65, 129, 190):
        tokens = sample_tokens(torch.full((vocabulary,), -1e4), keys_of(20_000), 1.0, 1.0)
        assert tokens.min() >= 0 and tokens.max() < vocabulary
        assert tokens.unique().numel() == vocabulary


def naive_nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Renormalised probabilities of the nucleus, one token at a time from the most probable one."""
    kept, total = set(), 0.0
    for token in probabilities.argsort(descending=True).tolist():
        if total >= top_p:
            break
        kept.add(token)
        total += probabilities[token].item()
        last = probabilities[token]
    kept |= {token for token, probability in enumerate(probabilities) if probability == last}
    mask = torch.tensor([token in kept for token in range(len(probabilities))])
    return torch.where(mask, probabilities, 0.0) / probabilities[mask].sum()


@settings(max_examples=60)
@given(st.lists(st.integers(-8, 8), min_size=1, max_size=20), st.floats(0.05, 0.98))
def test_nucleus_equals_a_loop(values, top_p):
    """Integer logits, so that there are many ties."""
    logits = torch.tensor(values, dtype=torch.float64)
    expected = naive_nucleus(logits.softmax(dim=-1), top_p)
    kept = keep_nucleus(logits, top_p)
    torch.testing.assert_close(kept.softmax(dim=-1), expected)
    assert torch.equal(kept[expected > 0], logits[expected > 0])


def test_nucleus_keeps_the_token_that_crosses_and_ties_with_it():
    logits = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64).log()
    kept = [keep_nucleus(logits, top_p).isfinite().tolist() for top_p in (0.4, 0.49, 0.6, 0.85)]
    assert kept[0] == kept[1] == [True, False, False, False]
    assert kept[2] == kept[3] == [True, True, True, False]


def test_top_p_comes_after_the_temperature():
    """At temperature 0.25 the first token alone reaches 0.8; at temperature 1 it does not."""
    logits = torch.tensor([1.0, 0.0, -1.0])
    assert (logits.softmax(-1)[0] < 0.8) and ((logits / 0.25).softmax(-1)[0] > 0.8)
    assert sample_tokens(logits, keys_of(5000), 0.25, 0.8).eq(0).all()
    assert sample_tokens(logits, keys_of(5000), 1.0, 0.8).unique().tolist() == [0, 1]


def test_a_block_s_score_needs_only_its_own_logits_and_the_token_only_its_block():
    """What tensor-parallel shards rely on."""
    vocabulary, keys = 64 * 5, keys_of(50)
    logits, others = random_logits(vocabulary), random_logits(vocabulary, seed=1)
    for block in (0, 17, 63):
        own = slice(block * 5, block * 5 + 5)
        mixed = others.clone()
        mixed[own] = logits[own]
        assert torch.equal(block_scores(mixed, keys)[:, block], block_scores(logits, keys)[:, block])
        chosen = torch.full_like(keys, block)
        assert torch.equal(token_in_block(mixed, keys, chosen), token_in_block(logits, keys, chosen))


def test_scores_of_empty_blocks_are_minus_infinity():
    scores = block_scores(random_logits(100), keys_of(3))
    assert scores.shape == (3, NUM_VOCABULARY_BLOCKS) and scores.dtype == torch.float64
    assert scores[:, :50].isfinite().all() and scores[:, 50:].isneginf().all()


def test_logits_shared_by_samples_broadcast():
    logits = torch.randn(2, 1, 3, 131, generator=torch.Generator().manual_seed(0))
    keys = noise_keys(0, 0, torch.arange(2), 4, 3, 0)
    shared = sample_tokens(logits, keys, 0.6, 0.95)
    assert shared.shape == keys.shape
    assert torch.equal(shared, sample_tokens(logits.expand(-1, 4, -1, -1), keys, 0.6, 0.95))
    for sample in range(4):
        assert torch.equal(shared[:, sample], sample_tokens(logits[:, 0], keys[:, sample], 0.6, 0.95))
    assert sample_tokens(logits[1, 0, 2], keys[1, 3, 2], 0.6, 0.95) == shared[1, 3, 2]


def test_low_precision_logits_are_cast_before_they_are_divided():
    logits = random_logits(1000, dtype=torch.bfloat16)
    assert torch.equal(at_temperature(logits, 0.6), logits.float() / 0.6)
    assert at_temperature(logits.double(), 0.6).dtype == torch.float64
    keys = keys_of(2000)
    assert torch.equal(sample_tokens(logits, keys, 0.6, 1.0), sample_tokens(logits.float(), keys, 0.6, 1.0))


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (1.0, 1.1)])
def test_settings_out_of_range_are_refused(temperature, top_p):
    with pytest.raises(ValueError, match="must"):
        sample_tokens(torch.zeros(3), keys_of(1), temperature, top_p)
