"""Sampling and scoring with the vocabulary on one, two and four ranks: the same tokens, numbers and gradients."""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ebft_mega.architecture.vocabulary_blocks import padded_vocabulary
from ebft_mega.model.head import ScoredTokens, gradient_of_logits, logprobs_of_rows, score_rows
from ebft_mega.parallel.groups import connect, make_process_groups
from ebft_mega.parallel.vocabulary import VocabularySlice
from ebft_mega.rollout.noise import noise_keys
from ebft_mega.rollout.sampling import at_temperature, keep_nucleus, sample_tokens
from tests.distributed.ranks import run_ranks

RANKS = [2, 4]
ROWS, SAMPLES, BLOCKS, CHOICES = 3, 4, 5, 2
TEMPERATURE = 0.6
HIDDEN = 16  # values in a row before the head
TOP_P = [1.0, 0.9, 0.3]
COLLECTIVES = [
    *("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_single", "gather", "scatter"),
    *("reduce_scatter", "reduce_scatter_single", "all_to_all", "all_to_all_single", "send", "recv", "isend", "irecv"),
    *("batch_isend_irecv", "all_gather_object", "broadcast_object_list", "gather_object", "barrier"),
]


@dataclass(frozen=True)
class Case:
    """Logits of one vocabulary."""

    vocabulary: int
    dtype: torch.dtype
    ties: bool = False

    @property
    def name(self) -> str:
        return f"{self.vocabulary}-{str(self.dtype)[6:]}{'-ties' * self.ties}"


# Not a multiple of 64, exactly 64, fewer than ranks times blocks need, several tokens per block with a short last one.
CASES = [
    *(Case(vocabulary, dtype) for vocabulary in (131, 64, 5, 200) for dtype in (torch.float32, torch.float64)),
    Case(200, torch.float32, ties=True),
    Case(131, torch.bfloat16),
]
# In columns that belong to no token.
GARBAGE = [1e4, math.nan]


def inputs_of(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Whole logits [B, n, K, V] (a transposed view), keys, choices [..., m] and an upstream gradient."""
    generator = torch.Generator().manual_seed(case.vocabulary)
    shape = (ROWS, BLOCKS, SAMPLES)
    logits = 2 * torch.randn(*shape, case.vocabulary, generator=generator, dtype=torch.float64)
    logits = (logits.round() if case.ties else logits).to(case.dtype).transpose(1, 2)
    keys = noise_keys(1, 2, torch.arange(ROWS), SAMPLES, BLOCKS, 0)
    choices = torch.randint(0, case.vocabulary, (*keys.shape, CHOICES), generator=generator)
    upstream = torch.randn(*choices.shape, generator=generator, dtype=torch.float64)
    return logits, keys, choices, upstream.to(torch.promote_types(case.dtype, torch.float32))


def own_columns(logits: Tensor, own_slice: VocabularySlice, garbage: float) -> Tensor:
    """A rank's slice of whole logits, as a view like the one that the head's output becomes."""
    ranks = own_slice.num_ranks
    padding = padded_vocabulary(own_slice.size, ranks) - own_slice.size
    return (
        F.pad(logits.transpose(1, 2), (0, padding), value=garbage)
        .chunk(ranks, dim=-1)[own_slice.first // own_slice.width]
        .transpose(1, 2)
    )


def draw(logits: Tensor, keys: Tensor, top_p: float, own_slice: VocabularySlice) -> Tensor:
    """Tokens of keys [B, n, K] from logits [B, 1 or n, K, width]."""
    rows = torch.arange(logits.shape[:-1].numel()).view(logits.shape[:-1]).expand(keys.shape)
    return sample_tokens(logits.flatten(0, 2), rows, keys, TEMPERATURE, top_p, own_slice)


def results_of(case: Case, garbage: float, groups) -> dict[str, Any]:
    """Tokens for each top_p, log-probabilities and this rank's gradient."""
    logits, keys, choices, upstream = inputs_of(case)
    own_slice = VocabularySlice.of(case.vocabulary, groups)
    own = own_columns(logits, own_slice, garbage)
    tokens = {top_p: draw(own, keys, top_p, own_slice) for top_p in TOP_P}
    shared = draw(own[:, :1], keys, 0.9, own_slice)
    nucleus = keep_nucleus(own_slice.exclude_padding_(at_temperature(own, TEMPERATURE)), 0.9, own_slice)
    rows, tokens_of_rows = own.flatten(0, 2), choices.flatten(0, 2)
    temperature = torch.full((len(rows),), TEMPERATURE, dtype=torch.float64)
    scores = score_rows(rows, tokens_of_rows, temperature, own_slice, with_entropy=True)
    of_rows = rows, tokens_of_rows, temperature, scores.normalizers
    gradient = gradient_of_logits(*of_rows, upstream.flatten(0, 2), own_slice)
    none, towards_entropies = torch.zeros_like(upstream.flatten(0, 2)), upstream.flatten(0, 2)[:, 0]
    of_entropies = gradient_of_logits(*of_rows, none, own_slice, entropy=(scores.entropies, towards_entropies))
    return {
        "tokens": tokens,
        "shared": shared,
        "kept": nucleus.isfinite(),
        "logprobs": scores.logprobs.view(choices.shape),
        "gradient": gradient.view(own.shape),
        "entropies": scores.entropies.view(choices.shape[:-1]),
        "gradient_of_entropies": of_entropies.view(own.shape),
    }


def all_results() -> dict[tuple[str, str], dict[str, Any]]:
    """What one of several ranks finds."""
    device = connect()
    groups = make_process_groups(device, tensor_parallel_size=dist.get_world_size())
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # a name that torch has deprecated
        return {(case.name, str(garbage)): results_of(case, garbage, groups) for case in CASES for garbage in GARBAGE}


@pytest.fixture(scope="module", params=RANKS)
def of_ranks(request):
    return run_ranks(request.param, all_results)


@pytest.mark.parametrize("garbage", [str(value) for value in GARBAGE])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_degree_draws_and_scores_the_same(case, garbage, of_ranks, groups):
    expected = results_of(case, 0.0, groups)
    found = [results[case.name, garbage] for results in of_ranks]
    for own in found:
        for top_p in TOP_P:
            assert torch.equal(own["tokens"][top_p], expected["tokens"][top_p]), top_p
            assert own["tokens"][top_p].dtype == torch.int64
        assert torch.equal(own["shared"], expected["shared"])
        assert torch.equal(own["logprobs"], found[0]["logprobs"])
    kept = torch.cat([own["kept"] for own in found], dim=-1)
    assert torch.equal(kept[..., : case.vocabulary], expected["kept"])
    assert not kept[..., case.vocabulary :].any()
    assert case.vocabulary < 10 or not expected["kept"].all()


@pytest.mark.parametrize("garbage", [str(value) for value in GARBAGE])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logprobs_and_gradients_equal_torch_s_log_softmax(case, garbage, of_ranks):
    logits, _, choices, upstream = inputs_of(case)
    logits = logits.double().requires_grad_()
    expected = (logits / TEMPERATURE).log_softmax(dim=-1).gather(-1, choices)
    (expected_gradient,) = torch.autograd.grad(expected, logits, upstream.double())
    found = [results[case.name, garbage] for results in of_ranks]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-6}[case.dtype]
    for own in found:
        torch.testing.assert_close(own["logprobs"].double(), expected, atol=tolerance, rtol=tolerance)
    gradient = torch.cat([own["gradient"] for own in found], dim=-1)
    assert gradient.dtype == case.dtype
    assert gradient[..., case.vocabulary :].eq(0).all()
    tolerance = 4e-3 if case.dtype == torch.bfloat16 else tolerance
    torch.testing.assert_close(
        gradient[..., : case.vocabulary].double(), expected_gradient, atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("garbage", [str(value) for value in GARBAGE])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_entropies_and_their_gradients_equal_those_of_torch(case, garbage, of_ranks):
    logits, _, _, upstream = inputs_of(case)
    logits = logits.double().requires_grad_()
    logprobs = (logits / TEMPERATURE).log_softmax(dim=-1)
    expected = -(logprobs.exp() * logprobs).sum(dim=-1)
    (expected_gradient,) = torch.autograd.grad(expected, logits, upstream[..., 0].double())
    found = [results[case.name, garbage] for results in of_ranks]
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6}[case.dtype]
    for own in found:
        torch.testing.assert_close(own["entropies"].double(), expected, atol=tolerance, rtol=tolerance)
        assert torch.equal(own["entropies"], found[0]["entropies"])
    gradient = torch.cat([own["gradient_of_entropies"] for own in found], dim=-1)
    assert gradient[..., case.vocabulary :].eq(0).all()
    tolerance = 4e-3 if case.dtype == torch.bfloat16 else tolerance
    torch.testing.assert_close(
        gradient[..., : case.vocabulary].double(), expected_gradient, atol=tolerance, rtol=tolerance
    )


def scores_of_no_rows() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the log-probabilities and the gradient of nothing: what rollouts of one token leave to decode."""
    groups = make_process_groups(connect(), tensor_parallel_size=dist.get_world_size())
    own_slice = VocabularySlice.of(131, groups)
    rows = torch.empty(0, HIDDEN, requires_grad=True)
    scored = ScoredTokens(torch.empty(0, 1, dtype=torch.int64), torch.empty(0, dtype=torch.float64))
    logprobs = logprobs_of_rows(rows, torch.ones(own_slice.width, HIDDEN), scored, own_slice)
    (gradient,) = torch.autograd.grad(logprobs.sum(), rows)
    return tuple(logprobs.shape), tuple(gradient.shape)


def test_no_rows_are_scored_without_harm():
    assert run_ranks(2, scores_of_no_rows) == [((0, 1), (0, HIDDEN))] * 2


def nucleus_of_steps(step: float) -> Tensor:
    """The nucleus of 0.9 when all tokens of a rank are equal and those of the next are `step` less probable."""
    groups = make_process_groups(connect(), tensor_parallel_size=dist.get_world_size())
    own_slice = VocabularySlice.of(64, groups)
    return keep_nucleus(
        torch.full((2, own_slice.width), -step * groups.tensor_parallel_rank), 0.9, own_slice
    ).isfinite()


@pytest.mark.parametrize("ranks", RANKS)
def test_the_nucleus_may_end_with_a_rank_s_least_probable_tokens(ranks):
    """At a step of 0.099 rank 0 has 0.9011 of the mass on four ranks and 0.9099 on two; at 0.12 less than 0.9."""
    kept = run_ranks(ranks, nucleus_of_steps, math.log(1 / 0.099))
    assert kept[0].all() and not any(own.any() for own in kept[1:])
    kept = run_ranks(ranks, nucleus_of_steps, math.log(1 / 0.12))
    assert [own.all().item() for own in kept] == [True, True, False, False][:ranks]
    assert not any(own.any() for own in kept[2:])


def count_bytes(vocabulary: int, dtype: torch.dtype) -> dict[str, list[tuple[str, int]]]:
    """Name and bytes sent of every collective of each call, in order."""
    device = connect()
    groups = make_process_groups(device, tensor_parallel_size=dist.get_world_size())
    calls: list[tuple[str, int]] = []

    def counting(name: str, function: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            # Of an all-gather the second argument is what is sent.
            sent = args[1] if name == "all_gather_single" else args[0]
            calls.append((name, sent.numel() * sent.element_size()))
            return function(*args, **kwargs)

        return counted

    for name in COLLECTIVES:
        setattr(dist, name, counting(name, getattr(dist, name)))

    def calls_of(function: Any) -> list[tuple[str, int]]:
        calls.clear()
        function()
        return list(calls)

    logits, keys, choices, upstream = inputs_of(Case(vocabulary, dtype))
    own_slice = VocabularySlice.of(vocabulary, groups)
    own = own_columns(logits, own_slice, 0.0)
    shared = own[:, :1]
    rows = torch.randn(choices.shape[:-1].numel(), HIDDEN, dtype=dtype).requires_grad_()
    weight = torch.randn(own_slice.width, HIDDEN, dtype=dtype)
    scored = ScoredTokens(choices.flatten(0, 2), torch.full((len(rows),), TEMPERATURE, dtype=torch.float64))
    return {
        "sample": calls_of(lambda: draw(own, keys, 1.0, own_slice)),
        "nucleus": calls_of(lambda: draw(own, keys, 0.9, own_slice)),
        "shared nucleus": calls_of(lambda: draw(shared, keys, 0.9, own_slice)),
        "logprobs": calls_of(
            lambda: logprobs_of_rows(rows, weight, scored, own_slice).backward(gradient=upstream.flatten(0, 2))
        ),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("vocabulary", [131, 2000])
def test_bytes_on_the_wire_are_the_formulas_and_do_not_depend_on_the_vocabulary(vocabulary, dtype):
    num_keys = ROWS * SAMPLES * BLOCKS
    size, rounds = (8, 16) if dtype == torch.float64 else (4, 8)

    def nucleus(rows: int) -> list[tuple[str, int]]:
        return [("all_reduce", size * rows), ("all_reduce", 8 * rows), *[("all_reduce", 15 * 8 * rows)] * rounds]

    gather = ("all_gather_single", 16 * num_keys)
    expected = {
        "sample": [gather],
        "nucleus": [*nucleus(num_keys), gather],
        "shared nucleus": [*nucleus(ROWS * BLOCKS), gather],
        "logprobs": [
            ("all_reduce", size * num_keys),
            ("all_reduce", size * (1 + CHOICES) * num_keys),
            ("all_reduce", dtype.itemsize * HIDDEN * num_keys),  # the rows' gradient
        ],
    }
    for counted in run_ranks(2, count_bytes, vocabulary, dtype):
        assert counted == expected
    for counted in run_ranks(1, count_bytes, vocabulary, dtype):
        assert counted == dict.fromkeys(expected, [])
