"""Baselines of others: exact expectations over all sample sets, and what `rloo` and a plain loop say."""

import itertools

import pytest
import torch

from ebft_mega.apps.noise.other_baselines import (
    advantages_over,
    optimal_token_weights,
    prefix_weights,
    squared_probabilities,
)
from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.partition import StageShape
from ebft_mega.block_plan import BlockPlan
from ebft_mega.forest import Forest
from ebft_mega.model.stage import Stage
from ebft_mega.model.weights.stage_weights import load_weights
from ebft_mega.model.weights.weight_sources import RandomWeights
from ebft_mega.objective.estimators.rloo import Rloo
from ebft_mega.rollout.score import ScoreRequest, score
from ebft_mega.types import BlockRewards, TermValues

VOCABULARY, SAMPLES, ALPHA, DELTA = 3, 3, 0.7, 1.3


def exact_setting():
    """A policy over two tokens, features of both, and all sample sets: tokens [sets, n, 1, 2], probabilities, gram."""
    generator = torch.Generator().manual_seed(0)
    first, second, features, target = (
        torch.randn(*shape, dtype=torch.float64, generator=generator)
        for shape in ((VOCABULARY,), (VOCABULARY, VOCABULARY), (VOCABULARY, VOCABULARY, 4), (4,))
    )
    leaves = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=2)))
    sets = leaves[torch.tensor(list(itertools.product(range(len(leaves)), repeat=SAMPLES)))]  # [sets, n, 2]
    of_set = features[sets[..., 0], sets[..., 1]]
    with_target = torch.cat((of_set, target.expand(len(sets), 1, -1)), dim=1)
    gram = (with_target @ with_target.mT)[:, None]
    return first.requires_grad_(), second.requires_grad_(), features, target, sets, gram


def token_logprobs(first, second, sets):
    return torch.stack((first.log_softmax(0)[sets[..., 0]], second.log_softmax(1)[sets[..., 0], sets[..., 1]]), dim=-1)


def weights_of(name, sets, logprobs, second, first):
    if name == "prefix":
        return prefix_weights(sets[:, :, None])
    squares = torch.stack(
        (
            first.softmax(0).square().sum().expand(sets.shape[:2]),
            second.softmax(1).square().sum(dim=1)[sets[..., 0]],
        ),
        dim=-1,
    )
    return optimal_token_weights(logprobs[:, :, None], squares[:, :, None])


@pytest.mark.parametrize("name", ["prefix", "optimal"])
def test_the_expectation_is_the_gradient_of_the_objective(name):
    first, second, features, target, sets, gram = exact_setting()
    probability = first.softmax(0)[:, None] * second.softmax(1)
    mean = (probability[..., None] * features).sum(dim=(0, 1))
    objective = DELTA * mean @ mean - 2 * ALPHA * target @ mean
    expected = torch.autograd.grad(-objective, (first, second))

    logprobs = token_logprobs(first, second, sets)
    weights = weights_of(name, sets, logprobs.detach(), second.detach(), first.detach())
    advantages = advantages_over(weights, gram, ALPHA, DELTA)[:, :, 0]  # [sets, n, 2]
    of_sets = logprobs.detach().sum(dim=(1, 2)).exp()
    surrogate = (of_sets[:, None, None] * advantages * logprobs).sum() / SAMPLES
    for found, wanted in zip(torch.autograd.grad(surrogate, (first, second)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_equal_weights_are_rloo():
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(2, 3, 5, 6, dtype=torch.float64, generator=generator)  # [B, K, n + 1, D]
    gram = features @ features.mT
    similar = gram[..., :-1, :-1]
    diversity = 2 * (similar.sum(-1) - similar.diagonal(dim1=-2, dim2=-1)) / 3
    terms = {
        "alignment": TermValues(2 * gram[..., :-1, -1].transpose(1, 2), ALPHA, "others"),
        "diversity": TermValues(diversity.transpose(1, 2), -DELTA, "pairs"),
    }
    reward = sum(term.coefficient * term.values for term in terms.values())
    rewards = BlockRewards(terms, reward, reward[:, 0])
    wanted = Rloo().advantages(type("Inputs", (), {"rewards": rewards})())
    found = advantages_over(torch.ones(2, 3, 4, 4, 2, dtype=torch.float64), gram, ALPHA, DELTA)
    torch.testing.assert_close(found, wanted[..., None].expand_as(found), rtol=0, atol=1e-12)
    none = advantages_over(torch.zeros(2, 3, 4, 4, 2, dtype=torch.float64), gram, ALPHA, DELTA)
    torch.testing.assert_close(none, found, rtol=0, atol=1e-12)


def test_prefix_weights_fall_back_to_the_longest_shared_prefix():
    tokens = torch.tensor([[5, 1, 2], [5, 1, 3], [5, 4, 2], [6, 1, 2]])[None, :, None]
    found = prefix_weights(tokens)[0, 0]  # [j, k, t]
    assert found[..., 0].tolist() == [[0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0]]
    assert found[..., 1].tolist() == [[0, 1, 1, 0], [1, 0, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert found[..., 2].tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]


def test_squared_probabilities_of_a_model(groups, inputs):
    architecture = Architecture.from_hf({**inputs.model_fields, "initializer_range": 0.5}, "test")
    stage = Stage(architecture, StageShape.whole(architecture), groups, torch.float32)
    load_weights(stage, RandomWeights(architecture, 1))
    plan = BlockPlan(sequence_length=12, stride=4, context_length=4, generate_length=4, num_samples=2)
    rows = torch.arange(12)[None] * 7 % 100
    rollouts = torch.tensor([[5, 6, 7, 8], [5, 9, 1, 2]])[None, :, None].expand(-1, -1, plan.num_blocks, -1)
    request = ScoreRequest(rows, Forest.of(rollouts, merges=True), targets=False, temperature=0.7)
    found = squared_probabilities(stage, request, plan)
    assert found.shape == rollouts.shape
    for sample, block, t in ((0, 0, 0), (1, 0, 2), (0, 1, 3)):
        text = torch.cat((rows[0, : plan.anchors[block]], rollouts[0, sample, block, :t]))
        probabilities = next_probabilities(stage, text, 0.7)
        torch.testing.assert_close(found[0, sample, block, t], probabilities.square().sum(), rtol=1e-5, atol=1e-7)


def next_probabilities(stage, text, temperature):
    """Of every token of the vocabulary after a text: rollouts of one token each."""
    plan = BlockPlan(len(text) + 1, 1, len(text), 1, 100)
    every = Forest.of(torch.arange(100)[None, :, None, None], merges=False)
    with torch.no_grad():
        (logprobs,) = score(stage, ScoreRequest(torch.cat((text, text[:1]))[None], every, False, temperature), plan)
    return logprobs.exp()
