"""The critic's regressions: normal equations, the ridge of each block, decay, and what adds nothing."""

import pytest
import torch

from ebft_mega.block_plan import BlockPlan
from ebft_mega.critic.critic_terms import Objective
from ebft_mega.critic.fitted_critic import FittedCritic
from ebft_mega.critic.ridge import CriticWeights, Statistics, solved
from ebft_mega.critic.token_table import token_table
from ebft_mega.extension.critic_settings import CriticSettings

RANK, LENGTH, CHANNELS = 3, 2, 5
REGRESSORS = 4 * RANK + 1


def statistics_of(seed: int, count: int = 50) -> Statistics:
    """Of made-up regressors, the constant among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(LENGTH, count, REGRESSORS, generator=generator, dtype=torch.float64)
    x[..., 3 * RANK] = 3.0
    y = torch.randn(LENGTH, count, CHANNELS, generator=generator, dtype=torch.float64)
    return Statistics(x.transpose(1, 2) @ x, x.transpose(1, 2) @ y)


@pytest.mark.parametrize("channels", [CHANNELS, 0])
def test_the_solution_leaves_no_residual_of_the_normal_equations(channels):
    given = statistics_of(0)
    given = Statistics(given.squares, given.products[..., :channels])
    weights = solved(given, RANK, 0.1, 0.02)
    for t in range(LENGTH):
        diagonal = given.squares[t].diagonal()
        ridge = torch.cat(
            (
                (0.1 * diagonal[:-RANK].mean()).expand(REGRESSORS - RANK),
                (0.02 * diagonal[-RANK:].mean()).expand(RANK),
            )
        )
        both = torch.cat((weights.prefix[t], weights.token[t]))
        residual = (given.squares[t] + ridge.diag()) @ both - given.products[t]
        assert residual.shape == (REGRESSORS, channels)
        assert not channels or residual.abs().max() <= 1e-12 * given.products.abs().max()


def test_regressors_that_are_all_zero_have_no_weight():
    given = statistics_of(1)
    given.squares[:, -RANK:], given.squares[:, :, -RANK:], given.products[:, -RANK:] = 0.0, 0.0, 0.0
    weights = solved(given, RANK, 0.1, 0.02)
    assert weights.prefix.isfinite().all() and (weights.token == 0).all()


class FakeStep:
    """A step of which only the sums are asked for."""

    def __init__(self, statistics):
        self.statistics = statistics


@pytest.fixture
def critic(groups):
    settings = CriticSettings(rank=RANK, decay=0.9, warmup_batches=2)
    table = torch.zeros(7, RANK)
    plan = BlockPlan(10, 2, 2, LENGTH, 3)
    return FittedCritic(table, CHANNELS, settings, Objective(1.0, 1.0, 0.5), plan, groups)


def test_batches_decay_and_the_critic_is_used_once_there_are_enough(critic):
    first, second = statistics_of(2), statistics_of(3)
    critic.learn(FakeStep(first))
    assert critic.state.batches == 1 and critic.state.weights is None
    assert torch.equal(critic.state.statistics.squares, first.squares)
    critic.learn(FakeStep(second))
    torch.testing.assert_close(critic.state.statistics.products, 0.9 * first.products + second.products)
    expected = solved(critic.state.statistics, RANK, 0.1, 0.02)
    assert critic.state.batches == 2
    for name in ("prefix", "token"):
        assert torch.equal(getattr(critic.state.weights, name), getattr(expected, name))


@pytest.mark.parametrize("value", ["nothing counts", "squares", "products"])
def test_a_step_without_counted_blocks_or_with_a_value_that_is_not_finite_adds_nothing(critic, value):
    critic.learn(FakeStep(statistics_of(2)))
    before = critic.state
    given = statistics_of(3)
    if value == "nothing counts":
        given = Statistics(torch.zeros_like(given.squares), torch.zeros_like(given.products))
    else:
        getattr(given, value)[1, 0, 0] = torch.nan
    critic.learn(FakeStep(given))
    assert critic.state is before


def test_restored_statistics_give_the_same_weights(critic):
    for seed in range(3):
        critic.learn(FakeStep(statistics_of(seed)))
    weights, state = critic.state.weights, critic.state
    critic.restore(state)
    assert isinstance(weights, CriticWeights) and torch.equal(critic.state.weights.prefix, weights.prefix)


def test_vectors_of_tokens_are_principal_components():
    generator = torch.Generator().manual_seed(4)
    scales = torch.tensor([5.0, 3.0, 1.0, 0.3])
    embeddings = (torch.randn(500, 4, generator=generator) * scales) @ torch.linalg.qr(
        torch.randn(4, 4, generator=generator)
    ).Q + 2.0
    table = token_table(embeddings, 3)
    assert table.shape == (500, 3) and table.dtype == torch.float32
    assert abs(table.double().std(correction=0).item() - 1.0) <= 1e-5
    centred = embeddings.double() - embeddings.double().mean(dim=0)
    left, values, _ = torch.linalg.svd(centred, full_matrices=False)
    expected = left[:, :3] * values[:3]
    expected = expected / expected.std(correction=0)
    signs = (expected * table).sum(dim=0).sign()
    torch.testing.assert_close(table.double(), expected * signs, atol=1e-4, rtol=0)
    assert token_table(embeddings, 64).shape == (500, 4)
    assert (token_table(torch.ones(9, 4), 2) == 0).all()
