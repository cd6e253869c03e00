"""Two-level sampling draws from exactly the softmax, and from nothing but the vocabulary."""

import math

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ebft_mega.architecture.vocabulary_blocks import NUM_VOCABULARY_BLOCKS, padded_vocabulary
from ebft_mega.parallel.vocabulary import VocabularySlice
from ebft_mega.rollout.noise import noise_keys
from ebft_mega.rollout.sampling import at_temperature, block_scores, keep_nucleus, sample_tokens, token_in_block

NUM_DRAWS = 100_000


@pytest.fixture(scope="module")
def whole(groups):
    """The slice of a rank that has the whole vocabulary of a given size."""
    return lambda vocabulary: VocabularySlice.of(vocabulary, groups)


def keys_of(count: int, seed: int = 0) -> Tensor:
    return noise_keys(seed, 0, torch.arange(count), 1, 1, 0).flatten()


def draw(logits: Tensor, keys: Tensor, *settings) -> Tensor:
    """A token for every key, all from the same logits [V]."""
    return sample_tokens(logits[None], torch.zeros_like(keys), keys, *settings)


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
def test_draws_follow_the_softmax(vocabulary, whole):
    logits = random_logits(vocabulary, seed=vocabulary)
    tokens = draw(logits, keys_of(NUM_DRAWS, vocabulary), 0.7, 1.0, whole(vocabulary))
    assert_draws_follow(tokens, (logits / 0.7).softmax(dim=-1))


def test_a_wrong_temperature_would_be_noticed(whole):
    logits = random_logits(131)
    tokens = draw(logits, keys_of(NUM_DRAWS), 0.7, 1.0, whole(131))
    with pytest.raises(AssertionError):
        assert_draws_follow(tokens, (logits / 0.72).softmax(dim=-1))


def test_draws_follow_the_nucleus(whole):
    logits = random_logits(131)
    tokens = draw(logits, keys_of(NUM_DRAWS), 0.7, 0.8, whole(131))
    probabilities = naive_nucleus((logits / 0.7).softmax(dim=-1), 0.8)
    assert (probabilities == 0).any()
    assert_draws_follow(tokens, probabilities)


def test_samples_of_different_keys_are_independent(whole):
    """Pairs of draws for neighbouring samples, as one variable with 49 values."""
    logits = random_logits(7)
    keys = noise_keys(0, 0, torch.arange(NUM_DRAWS), 2, 1, 0)[..., 0]
    pairs = draw(logits, keys, 1.0, 1.0, whole(7))
    probabilities = logits.double().softmax(dim=-1)
    joint = (probabilities[:, None] * probabilities).flatten()
    assert_draws_follow(pairs[:, 0] * 7 + pairs[:, 1], joint)


def test_a_vocabulary_of_one_and_certain_tokens(whole):
    assert draw(torch.zeros(1), keys_of(1000), 1.0, 1.0, whole(1)).eq(0).all()
    certain = torch.empty(130)
    for token in (0, 1, 2, 64, 127, 129):
        certain.fill_(-1e30)[token] = -3.0
        assert draw(certain, keys_of(1000), 1.0, 1.0, whole(130)).eq(token).all()


def test_padding_is_never_drawn(whole):
    """Logits far below zero: padding of 0 instead of minus infinity would win at once."""
    for vocabulary in (3, 65, 129, 190):
        logits = torch.full((vocabulary,), -1e4)
        tokens = draw(logits, keys_of(20_000), 1.0, 1.0, whole(vocabulary))
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
def test_nucleus_equals_a_loop(whole, values, top_p):
    """Integer logits, so that there are many ties."""
    logits = torch.tensor(values, dtype=torch.float64)
    expected = naive_nucleus(logits.softmax(dim=-1), top_p)
    kept = keep_nucleus(logits, top_p, whole(len(logits)))
    torch.testing.assert_close(kept.softmax(dim=-1), expected)
    assert torch.equal(kept[expected > 0], logits[expected > 0])


def test_nucleus_keeps_the_token_that_crosses_and_ties_with_it(whole):
    logits = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64).log()
    kept = [keep_nucleus(logits, top_p, whole(4)).isfinite().tolist() for top_p in (0.4, 0.49, 0.6, 0.85)]
    assert kept[0] == kept[1] == [True, False, False, False]
    assert kept[2] == kept[3] == [True, True, True, False]


def test_top_p_comes_after_the_temperature(whole):
    """At temperature 0.25 the first token alone reaches 0.8; at temperature 1 it does not."""
    logits = torch.tensor([1.0, 0.0, -1.0])
    assert (logits.softmax(-1)[0] < 0.8) and ((logits / 0.25).softmax(-1)[0] > 0.8)
    assert draw(logits, keys_of(5000), 0.25, 0.8, whole(3)).eq(0).all()
    assert draw(logits, keys_of(5000), 1.0, 0.8, whole(3)).unique().tolist() == [0, 1]


def test_a_block_s_score_needs_only_its_own_logits_and_the_token_only_its_block(whole):
    """What tensor-parallel shards rely on."""
    vocabulary, keys = 64 * 5, keys_of(50)
    logits, others, own_slice = random_logits(vocabulary), random_logits(vocabulary, seed=1), whole(vocabulary)
    first = torch.zeros_like(keys)
    for block in (0, 17, 63):
        own = slice(block * 5, block * 5 + 5)
        mixed = others.clone()
        mixed[own] = logits[own]
        assert torch.equal(
            block_scores(mixed[None], first, keys, own_slice)[:, block],
            block_scores(logits[None], first, keys, own_slice)[:, block],
        )
        chosen = torch.full_like(keys, block)
        assert torch.equal(
            token_in_block(mixed[None], first, keys, chosen, own_slice),
            token_in_block(logits[None], first, keys, chosen, own_slice),
        )


def slices_of(vocabulary: int, ranks: int) -> list[VocabularySlice]:
    """What each of several ranks has; nothing here communicates, so they need no group."""
    width = padded_vocabulary(vocabulary, ranks) // ranks
    return [VocabularySlice(vocabulary, rank * width, width, None) for rank in range(ranks)]


@settings(max_examples=40)
@given(
    st.integers(1, 700), st.sampled_from([2, 4, 8, 16, 64]), st.integers(0, 10**6), st.sampled_from([0.05, 1.0, 9.0])
)
def test_slices_score_their_blocks_bit_for_bit_as_the_whole(whole, vocabulary, ranks, seed, scale):
    """Padding is 1e4 before it is excluded, each rank's columns are a view, and rows are taken in another order."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(6, vocabulary, generator=generator)
    keys = noise_keys(seed, 0, torch.arange(2), 3, 1, 0)[..., 0]
    rows = torch.randperm(6, generator=generator).view(2, 3)
    expected = block_scores(logits, rows, keys, whole(vocabulary))
    padded = torch.nn.functional.pad(logits, (0, padded_vocabulary(vocabulary, ranks) - vocabulary), value=1e4)
    own = [
        block_scores(own_slice.exclude_padding_(part.clone()), rows, keys, own_slice)
        for part, own_slice in zip(padded.chunk(ranks, dim=-1), slices_of(vocabulary, ranks), strict=True)
    ]
    scores = torch.cat(own, dim=-1)
    assert scores.shape == (2, 3, NUM_VOCABULARY_BLOCKS) and scores.dtype == expected.dtype == torch.float64
    assert torch.equal(scores[..., : expected.shape[-1]], expected)
    assert scores[..., expected.shape[-1] :].isneginf().all()


def test_blocks_without_tokens_are_not_scored(whole):
    scores = block_scores(random_logits(100)[None], torch.zeros(3, dtype=torch.int64), keys_of(3), whole(100))
    assert scores.shape == (3, 50) and scores.isfinite().all()


@settings(max_examples=100)
@given(
    st.lists(st.sampled_from([-math.inf, -30.0, -1.0, -1e-38, -0.0, 0.0, 1e-45, 0.5, 1.0, 2.0]), min_size=1),
    st.floats(0.01, 0.99),
    st.sampled_from([torch.float32, torch.float64]),
)
@example([1e-45, 0.0], 0.5, torch.float32)  # neighbours, of which only the larger is kept
def test_nucleus_of_awkward_floats(whole, values, top_p, dtype):
    """Both zeros, subnormal numbers, tokens that are already excluded, float32 and float64."""
    logits = torch.tensor([*values, 0.25], dtype=dtype)
    kept = keep_nucleus(logits, top_p, whole(len(logits)))
    ordered = logits.double().sort(descending=True).values
    reached = ordered.softmax(dim=-1).cumsum(dim=-1)
    assume((reached - top_p).abs().min() > 1e-12)
    threshold = ordered[(reached >= top_p).nonzero()[0, 0]]
    assert torch.equal(kept, logits.masked_fill(logits < threshold, -torch.inf))


@pytest.mark.parametrize(("tail", "top_p"), [(-14.0, 0.95), (-14.0, 0.8), (0.0, 0.5)])
def test_nucleus_of_many_tokens_that_weigh_little_or_the_same(whole, tail, top_p):
    """150 000 tokens of one in a million each are an eighth of the mass; as many of full weight do not overflow."""
    logits = torch.full((150_001,), tail)
    logits[77] = 0.0
    first = 1 / (1 + 150_000 * math.exp(tail))
    expected = 1 if first >= top_p else len(logits)
    assert keep_nucleus(logits, top_p, whole(len(logits))).isfinite().sum() == expected


@given(st.lists(st.integers(0, 4), min_size=12, max_size=12), st.sampled_from([1.0, 0.95]))
def test_keys_that_share_a_row_draw_as_from_copies_of_it(whole, rows, top_p):
    """Every token depends on its own key and its row's logits alone, whoever else draws from the row."""
    logits = torch.randn(5, 131, generator=torch.Generator().manual_seed(0))
    keys = noise_keys(0, 0, torch.arange(3), 4, 1, 0)[..., 0]
    shared = sample_tokens(logits, torch.tensor(rows).view(3, 4), keys, 0.6, top_p, whole(131))
    assert shared.shape == keys.shape
    each = torch.arange(12).view(3, 4)
    assert torch.equal(shared, sample_tokens(logits[rows], each, keys, 0.6, top_p, whole(131)))
    assert shared[1, 2] == draw(logits[rows[6]], keys[1, 2], 0.6, top_p, whole(131))


def test_low_precision_logits_are_cast_before_they_are_divided(whole):
    logits = random_logits(1000, dtype=torch.bfloat16)
    assert torch.equal(at_temperature(logits, 0.6), logits.float() / 0.6)
    assert at_temperature(logits.double(), 0.6).dtype == torch.float64
    keys = keys_of(2000)
    tokens = [draw(same, keys, 0.6, 1.0, whole(1000)) for same in (logits, logits.float())]
    assert torch.equal(*tokens)


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (1.0, 1.1)])
def test_settings_out_of_range_are_refused(temperature, top_p, whole):
    with pytest.raises(ValueError, match="must"):
        draw(torch.zeros(3), keys_of(1), temperature, top_p, whole(3))
