"""Log-probabilities of chosen tokens equal the softmax written out; so do their gradients."""

import pytest
import torch
from torch import Tensor

from ebft_mega.objective.logprobs import selected_logprobs
from ebft_mega.parallel.vocabulary import VocabularyShard

VOCABULARY, TEMPERATURE = 11, 0.6


@pytest.fixture(scope="module")
def whole(groups):
    """The shard of a rank that has the whole vocabulary of a given size."""
    return lambda vocabulary: VocabularyShard.of(vocabulary, groups)


def random_case(rows: int, vocabulary: int, dtype: torch.dtype, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, four tokens per row (the third is the first again) and an upstream gradient."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (scale * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)).to(dtype)
    tokens = torch.randint(0, vocabulary, (rows, 4), generator=generator)
    tokens[:, 2] = tokens[:, 0]
    return logits, tokens, torch.randn(rows, 4, generator=generator, dtype=torch.float64)


def test_values_are_written_out_sums(whole):
    logits, tokens, _ = random_case(6, VOCABULARY, torch.float64)
    result = selected_logprobs(logits.view(2, 3, VOCABULARY), tokens.view(2, 3, 4), TEMPERATURE, whole(VOCABULARY))
    assert result.shape == (2, 3, 4) and result.dtype == torch.float64
    for row, own in enumerate(result.flatten(0, 1)):
        scores = logits[row] / TEMPERATURE
        for choice, token in enumerate(tokens[row].tolist()):
            torch.testing.assert_close(own[choice], scores[token] - scores.exp().sum().log())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("vocabulary", [1, 5, 64, 131, 1000])
def test_values_and_gradients_equal_torch_s_log_softmax(whole, vocabulary, dtype, tolerance):
    logits, tokens, upstream = random_case(50, vocabulary, dtype)
    logits.requires_grad_()
    result = selected_logprobs(logits, tokens, TEMPERATURE, whole(vocabulary))
    (gradient,) = torch.autograd.grad(result, logits, upstream.to(dtype))
    reference = logits.detach().double().requires_grad_()
    expected = (reference / TEMPERATURE).log_softmax(dim=-1).gather(-1, tokens)
    (expected_gradient,) = torch.autograd.grad(expected, reference, upstream)
    assert result.dtype == gradient.dtype == dtype
    torch.testing.assert_close(result.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(gradient.double(), expected_gradient, atol=tolerance, rtol=tolerance)


def test_gradient_equals_finite_differences(whole):
    logits, tokens, _ = random_case(6, VOCABULARY, torch.float64)
    logits = logits.view(2, 3, VOCABULARY).requires_grad_()

    def function(leaf: Tensor) -> Tensor:
        # A transposed view, as the head's output is one.
        return selected_logprobs(leaf.transpose(0, 1), tokens.view(3, 2, 4), TEMPERATURE, whole(VOCABULARY))

    assert torch.autograd.gradcheck(function, (logits,))


def test_a_second_backward_through_the_same_graph_gives_the_same(whole):
    logits, tokens, upstream = random_case(5, VOCABULARY, torch.float64)
    logits.requires_grad_()
    result = selected_logprobs(logits, tokens, 1.0, whole(VOCABULARY))
    first, second = (torch.autograd.grad(result, logits, upstream, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_low_precision_logits_are_scored_in_float32(whole):
    """Within float32 rounding of float64; the same in bfloat16 would be off in the second digit."""
    logits, tokens, upstream = random_case(200, 1000, torch.bfloat16, scale=10.0)
    logits.requires_grad_()
    result = selected_logprobs(logits, tokens, TEMPERATURE, whole(1000))
    assert result.dtype == torch.float32
    expected = selected_logprobs(logits.detach().double(), tokens, TEMPERATURE, whole(1000))
    torch.testing.assert_close(result.double(), expected, atol=2e-5, rtol=0)
    (gradient,) = torch.autograd.grad(result, logits, upstream.float())
    assert gradient.dtype == torch.bfloat16


def test_nothing_of_the_logits_size_is_kept_but_the_logits(whole):
    logits, tokens, _ = random_case(50, 1000, torch.bfloat16)
    logits.requires_grad_()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        selected_logprobs(logits, tokens, 1.0, whole(1000))
    large = [tensor for tensor in kept if tensor.numel() >= logits.numel()]
    assert [tensor.data_ptr() for tensor in large] == [logits.data_ptr()]


def test_logits_of_another_width_are_refused(whole):
    with pytest.raises(AssertionError, match="another vocabulary"):
        selected_logprobs(torch.zeros(2, 128), torch.zeros(2, 1, dtype=torch.int64), 1.0, whole(131))
