"""Log-probabilities of chosen tokens and entropies equal the softmax written out, gradients too, however chunked."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ebft_mega.model import head
from ebft_mega.model.head import LinearValues, RowScores, ScoredTokens, gradient_of_logits, logprobs_of_rows, score_rows
from ebft_mega.parallel.vocabulary import VocabularySlice

VOCABULARY, TEMPERATURE, HIDDEN = 11, 0.6, 6


@pytest.fixture(scope="module")
def whole(groups):
    """The slice of a rank that has the whole vocabulary of a given size."""
    return lambda vocabulary: VocabularySlice.of(vocabulary, groups)


def random_case(rows: int, vocabulary: int, dtype: torch.dtype, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, four tokens per row (the third is the first again) and an upstream gradient."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (scale * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)).to(dtype)
    tokens = torch.randint(0, vocabulary, (rows, 4), generator=generator)
    tokens[:, 2] = tokens[:, 0]
    return logits, tokens, torch.randn(rows, 4, generator=generator, dtype=torch.float64)


def temperatures(rows: int) -> Tensor:
    """One that changes from row to row."""
    return torch.linspace(0.5, 1.0, rows, dtype=torch.float64)


def test_values_are_written_out_sums(whole):
    logits, tokens, _ = random_case(6, VOCABULARY, torch.float64)
    temperature = temperatures(6)
    result = score_rows(logits, tokens, temperature, whole(VOCABULARY))
    assert result.logprobs.dtype == torch.float64
    for row, own in enumerate(result.logprobs):
        scores = logits[row] / temperature[row]
        torch.testing.assert_close(result.normalizers[row], scores.exp().sum().log())
        for choice, token in enumerate(tokens[row].tolist()):
            torch.testing.assert_close(own[choice], scores[token] - scores.exp().sum().log())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("vocabulary", [1, 5, 64, 131, 1000])
def test_values_and_gradients_equal_torch_s_log_softmax(whole, vocabulary, dtype, tolerance):
    logits, tokens, upstream = random_case(50, vocabulary, dtype)
    temperature = temperatures(50)
    scores = score_rows(logits, tokens, temperature, whole(vocabulary))
    gradient = gradient_of_logits(
        logits, tokens, temperature, scores.normalizers, upstream.to(dtype), whole(vocabulary)
    )
    reference = logits.double().requires_grad_()
    expected = (reference / temperature[:, None]).log_softmax(dim=-1).gather(-1, tokens)
    (expected_gradient,) = torch.autograd.grad(expected, reference, upstream)
    assert scores.logprobs.dtype == gradient.dtype == dtype
    torch.testing.assert_close(scores.logprobs.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(gradient.double(), expected_gradient, atol=5 * tolerance, rtol=5 * tolerance)


def test_low_precision_logits_are_scored_in_float32(whole):
    """Within float32 rounding of float64; the same in bfloat16 would be off in the second digit."""
    logits, tokens, upstream = random_case(200, 1000, torch.bfloat16, scale=10.0)
    temperature = temperatures(200)
    result = score_rows(logits, tokens, temperature, whole(1000))
    assert result.logprobs.dtype == torch.float32
    expected = score_rows(logits.double(), tokens, temperature, whole(1000))
    torch.testing.assert_close(result.logprobs.double(), expected.logprobs, atol=2e-5, rtol=0)
    gradient = gradient_of_logits(logits, tokens, temperature, result.normalizers, upstream.float(), whole(1000))
    assert gradient.dtype == torch.bfloat16


def head_case(rows: int = 50) -> tuple[Tensor, Tensor, ScoredTokens, Tensor]:
    """Rows, weight, what is scored, and an upstream gradient, in float64."""
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(131, HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 131, (rows, 3), generator=generator)
    upstream = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    return hidden, weight, ScoredTokens(tokens, temperatures(rows)), upstream


def expected_logprobs(hidden: Tensor, weight: Tensor, scored: ScoredTokens) -> Tensor:
    """All logits at once, recorded by autograd."""
    return (F.linear(hidden, weight) / scored.temperature[:, None]).log_softmax(-1).gather(-1, scored.tokens)


@pytest.mark.parametrize("chunk", [1, 7, 50, 512])
def test_chunks_give_the_values_and_gradients_of_all_logits_at_once(whole, monkeypatch, chunk):
    monkeypatch.setattr(head, "HEAD_ROWS", chunk)
    hidden, weight, scored, upstream = head_case()
    found = logprobs_of_rows(hidden, weight, scored, whole(131))
    expected = expected_logprobs(hidden, weight, scored)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    for own, other in zip(
        torch.autograd.grad(found, (hidden, weight), upstream),
        torch.autograd.grad(expected, (hidden, weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(own, other, atol=1e-11, rtol=0)


def test_known_rows_keep_their_values_and_have_the_same_gradient(whole, monkeypatch):
    monkeypatch.setattr(head, "HEAD_ROWS", 8)
    hidden, weight, scored, upstream = head_case()
    logits = F.linear(hidden, weight).detach()[:20]
    true = score_rows(logits, scored.tokens[:20], scored.temperature[:20], whole(131))
    known = RowScores(true.logprobs + 1.0, true.normalizers)  # a value that could only have been taken over
    found = logprobs_of_rows(hidden, weight, ScoredTokens(scored.tokens, scored.temperature, known), whole(131))
    expected = expected_logprobs(hidden, weight, scored)
    torch.testing.assert_close(found[:20] - 1.0, expected[:20], atol=1e-12, rtol=0)
    torch.testing.assert_close(found[20:], expected[20:], atol=1e-12, rtol=0)
    for own, other in zip(
        torch.autograd.grad(found, (hidden, weight), upstream),
        torch.autograd.grad(expected, (hidden, weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(own, other, atol=1e-11, rtol=0)


@pytest.mark.parametrize(("chunks", "limit"), [(1, 0.0025), (8, 0.005), (32, 0.01)])
def test_bfloat16_rounding_of_the_weight_gradient_grows_slowly_with_the_chunks(whole, monkeypatch, chunks, limit):
    """Relative error against float64: 0.2 % of one product, about twice that for 8 chunks, four times for 32."""
    rows = 32 * chunks
    monkeypatch.setattr(head, "HEAD_ROWS", 32)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 64, generator=generator).bfloat16() for size in (rows, 131))
    tokens = torch.randint(0, 131, (rows, 1), generator=generator)
    upstream = torch.randn(rows, 1, generator=generator)
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        leaf = (weight.to(dtype) / 8).requires_grad_()
        scored = ScoredTokens(tokens, torch.ones(rows, dtype=torch.float64))
        logprobs = logprobs_of_rows(hidden.to(dtype), leaf, scored, whole(131))
        found.append(torch.autograd.grad(logprobs, leaf, upstream.to(logprobs.dtype))[0].double())
    error = (found[0] - found[1]).norm() / found[1].norm()
    print(f"{chunks} chunks: {error:.4f}")
    assert limit / 5 < error < limit


def test_the_gradient_equals_finite_differences(whole):
    hidden, weight, scored, _ = head_case(5)
    small = weight[:VOCABULARY].detach().requires_grad_()
    fewer = ScoredTokens(scored.tokens % VOCABULARY, scored.temperature)
    assert torch.autograd.gradcheck(
        lambda rows, matrix: logprobs_of_rows(rows, matrix, fewer, whole(VOCABULARY)), (hidden, small)
    )


def expected_entropies(hidden: Tensor, weight: Tensor, scored: ScoredTokens) -> Tensor:
    """All logits at once, recorded by autograd; 0 for rows whose entropy is not asked for."""
    logprobs = (F.linear(hidden, weight) / scored.temperature[:, None]).log_softmax(-1)
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    return entropies.masked_fill(torch.arange(len(hidden)) < scored.entropies_from, 0.0)


@pytest.mark.parametrize(
    ("entropic", "known", "valued"), [(0, 0, 0), (20, 20, 0), (20, 20, 13), (33, 0, 20), (50, 0, 0)]
)
def test_entropies_and_their_gradients_are_those_of_autograd(whole, monkeypatch, entropic, known, valued):
    """Beside known rows and rows with values of their own; rows before have no part in it."""
    monkeypatch.setattr(head, "HEAD_ROWS", 8)
    hidden, weight, scored, upstream = head_case()
    generator = torch.Generator().manual_seed(1)
    table, directions = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (131, valued))
    logits = F.linear(hidden, weight).detach()[:known]
    of_known = score_rows(logits, scored.tokens[:known], scored.temperature[:known], whole(131), table)
    scored = replace(
        scored,
        known=of_known if known else None,
        values=LinearValues(table, directions) if valued else None,
        entropies_from=entropic,
    )
    found = logprobs_of_rows(hidden, weight, scored, whole(131))
    expected = [expected_logprobs(hidden, weight, scored), expected_entropies(hidden, weight, scored)[:, None]]
    if valued:
        softmax = (F.linear(hidden, weight) / scored.temperature[:, None]).softmax(-1)[:valued]
        expectations = (softmax @ table * directions).sum(-1)
        expected.insert(1, F.pad(expectations, (0, 50 - valued))[:, None])
    expected = torch.cat(expected, dim=-1)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    upstream = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    for own, other in zip(
        torch.autograd.grad(found, (hidden, weight), upstream),
        torch.autograd.grad(expected, (hidden, weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(own, other, atol=1e-11, rtol=0)


def test_the_gradient_of_entropies_equals_finite_differences(whole):
    hidden, weight, scored, _ = head_case(5)
    small = weight[:VOCABULARY].detach().requires_grad_()
    fewer = ScoredTokens(scored.tokens % VOCABULARY, scored.temperature, entropies_from=2)
    assert torch.autograd.gradcheck(
        lambda rows, matrix: logprobs_of_rows(rows, matrix, fewer, whole(VOCABULARY))[:, -1], (hidden, small)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entropies_of_certain_and_of_even_distributions(whole, dtype):
    """Where probabilities underflow there is no 0 times minus infinity, in the entropy or in its gradient."""
    logits = torch.zeros(3, 131, dtype=dtype)
    logits[1, 5], logits[2] = 3000.0, -1e6  # certain; even again
    tokens, temperature = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, dtype=torch.float64)
    scores = score_rows(logits, tokens, temperature, whole(131), with_entropy=True)
    expected = torch.tensor([math.log(131), 0.0, math.log(131)], dtype=dtype)
    torch.testing.assert_close(scores.entropies, expected, atol=1e-6, rtol=0)
    none, one = torch.zeros(3, 1, dtype=dtype), torch.ones(3, dtype=dtype)
    gradient = gradient_of_logits(
        logits, tokens, temperature, scores.normalizers, none, whole(131), entropy=(scores.entropies, one)
    )
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-5, rtol=0)
    logits[1, 7] = torch.nan
    assert score_rows(logits, tokens, temperature, whole(131), with_entropy=True).entropies.isnan().tolist() == [
        *(False, True, False)
    ]


def test_without_entropies_nothing_changes(whole):
    """Not a bit of values and gradients, nor what is kept."""
    hidden, weight, scored, upstream = head_case()
    plain = logprobs_of_rows(hidden, weight, scored, whole(131))
    with_entropies = logprobs_of_rows(hidden, weight, replace(scored, entropies_from=0), whole(131))
    assert torch.equal(plain, with_entropies[:, :-1])
    for own, other in zip(
        torch.autograd.grad(plain, (hidden, weight), upstream),
        torch.autograd.grad(with_entropies, (hidden, weight), F.pad(upstream, (0, 1))),
        strict=True,
    ):
        torch.testing.assert_close(own, other, atol=1e-15, rtol=1e-12)


def test_no_logits_are_kept_for_the_backward_pass(whole):
    hidden, weight, scored, _ = head_case()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs_of_rows(hidden, weight, scored, whole(131))
    assert sorted(tensor.numel() for tensor in kept) == [50, 50, 150, 50 * HIDDEN, 131 * HIDDEN]


def test_logits_of_another_width_are_refused(whole):
    with pytest.raises(AssertionError, match="another vocabulary"):
        score_rows(torch.zeros(2, 128), torch.zeros(2, 1, dtype=torch.int64), temperatures(2), whole(131))
