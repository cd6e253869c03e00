"""Logits that are not finite: a token all the same, its mark, and the bits of all other rows."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ebft_mega.model.head import gradient_of_logits, score_rows
from ebft_mega.parallel.vocabulary import VocabularySlice
from ebft_mega.rollout.noise import noise_keys
from ebft_mega.rollout.sampling import drawn_from_finite, sample_tokens, without_marks

ROWS, SAMPLES, BLOCKS = 2, 3, 2
TEMPERATURE = 0.7


@st.composite
def spoiled_logits(draw):
    """Logits [B, 1 or n, K, V], the same with some values spoiled, and which rows still are finite."""
    vocabulary = draw(st.sampled_from((1, 5, 64, 131)))
    dtype = draw(st.sampled_from((torch.float32, torch.float64, torch.bfloat16)))
    shape = ROWS, draw(st.sampled_from((1, SAMPLES))), BLOCKS, vocabulary
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    logits = (3 * torch.randn(shape, generator=generator)).to(dtype)
    spoiled, finite = logits.clone(), torch.ones(shape[:-1], dtype=torch.bool)
    for _ in range(draw(st.integers(1, 3))):
        row = tuple(draw(st.integers(0, size - 1)) for size in shape[:-1])
        column = draw(st.one_of(st.just(slice(None)), st.integers(0, vocabulary - 1)))
        spoiled[(*row, column)] = draw(st.sampled_from((math.nan, math.inf, -math.inf)))
        finite[row] = False
    return logits, spoiled, finite


@settings(max_examples=80)
@given(drawn=spoiled_logits(), top_p=st.sampled_from((1.0, 0.8, 1e-6)))
def test_tokens_of_spoiled_rows_alone_are_marked(groups, drawn, top_p):
    logits, spoiled, finite = drawn
    own_slice = VocabularySlice.of(logits.shape[-1], groups)
    keys = noise_keys(1, 2, torch.arange(ROWS), SAMPLES, BLOCKS, 0)
    rows = torch.arange(finite.numel()).view(finite.shape).expand(keys.shape)
    expected, found = (
        sample_tokens(values.flatten(0, 2), rows, keys, TEMPERATURE, top_p, own_slice) for values in (logits, spoiled)
    )
    finite = finite.expand(keys.shape)
    assert torch.equal(drawn_from_finite(found), finite) and drawn_from_finite(expected).all()
    assert torch.equal(found[finite], expected[finite]) and torch.equal(without_marks(expected), expected)
    tokens = without_marks(found)
    assert tokens.dtype == torch.int64 and tokens.min() >= 0 and tokens.max() < logits.shape[-1]


@settings(max_examples=60)
@given(drawn=spoiled_logits())
def test_scores_of_spoiled_rows_alone_are_nan(groups, drawn):
    """Whichever token is scored: one whose own logit is finite, too. So are their gradients."""
    logits, spoiled, finite = (value.flatten(0, 2) for value in drawn)
    own_slice = VocabularySlice.of(logits.shape[-1], groups)
    tokens = torch.randint(0, logits.shape[-1], (len(logits), 2), generator=torch.Generator().manual_seed(1))
    temperature = torch.full((len(logits),), TEMPERATURE, dtype=torch.float64)
    found, expected = (score_rows(values, tokens, temperature, own_slice) for values in (spoiled, logits))
    assert found.logprobs[~finite].isnan().all() and found.normalizers[~finite].isnan().all()
    assert torch.equal(found.logprobs[finite], expected.logprobs[finite])
    assert torch.equal(found.normalizers[finite], expected.normalizers[finite])
    gradient = gradient_of_logits(
        spoiled, tokens, temperature, found.normalizers, torch.ones_like(found.logprobs), own_slice
    )
    assert gradient[~finite].isnan().all() and gradient[finite].isfinite().all()
