"""Advantages by estimators outside the package: for each token, and against the contract."""

import math

import pytest
import torch

from ebft_mega.extension.advantage_estimator import AdvantageEstimator
from ebft_mega.extension.entry_fault import EntryFaultError
from ebft_mega.objective.block_advantages import block_advantages
from ebft_mega.reward.sampled_blocks import SampledBlocks
from ebft_mega.types import BlockRewards, TermValues
from tests.own_entries import Later
from tests.unit.reward.rewards import plan_of

ROWS, SAMPLES, BLOCKS, LENGTH = 2, 3, 4, 5
PLAN = plan_of(SAMPLES, BLOCKS, LENGTH)
DRAWS = torch.Generator().manual_seed(0)
REWARD = torch.randn(ROWS, SAMPLES, BLOCKS, dtype=torch.float64, generator=DRAWS)
TERMS = {"random": TermValues(REWARD, 1.0, "none")}
REWARDS = BlockRewards(TERMS, REWARD, torch.zeros(ROWS, BLOCKS))
SAMPLED = SampledBlocks(
    PLAN,
    torch.randint(0, 2, (ROWS, SAMPLES, BLOCKS, LENGTH), generator=DRAWS),
    torch.randint(0, 2, (ROWS, PLAN.sequence_length), generator=DRAWS),
)


class Returns(AdvantageEstimator):
    """Whatever it is made with."""

    name = "returns"

    def __init__(self, make):
        super().__init__()
        self.make = make

    def advantages(self, inputs):
        return self.make(inputs)


def test_an_estimator_may_give_every_token_its_own():
    found = block_advantages(Later(), REWARDS, PLAN, SAMPLED)
    assert found.shape == (ROWS, SAMPLES, BLOCKS, LENGTH)
    for row, sample, block, token in torch.cartesian_prod(*map(torch.arange, found.shape)).tolist():
        is_target = (
            SAMPLED.rollout_tokens[row, sample, block, token] == SAMPLED.row_tokens[row, PLAN.anchors[block] + token]
        )
        expected = REWARD[row, sample, block] * (token + 1) * (2 if is_target else 1)
        assert found[row, sample, block, token] == expected


BOTH = "a float64 tensor [B, n, K] = [2, 3, 4] or [B, n, K, G] = [2, 3, 4, 5] on cpu"


@pytest.mark.parametrize(
    ("make", "found", "expected"),
    [
        (lambda inputs: REWARD[..., None], "a float64 tensor [2, 3, 4, 1] on cpu", BOTH),
        (lambda inputs: REWARD.sum(), "a float64 tensor [] on cpu", BOTH),
        (lambda inputs: REWARD.float(), "a float32 tensor", BOTH),
        (lambda inputs: [1], "a list", BOTH),
        (lambda inputs: REWARD / 0, "inf at row 0, sample 0, block 0 of a micro-batch, 24 values in all", "finite"),
        (
            lambda inputs: (REWARD / 0)[..., None].expand(-1, -1, -1, LENGTH),
            "inf at row 0, sample 0, block 0, token 0 of a micro-batch, 120 values in all",
            "finite",
        ),
        (lambda inputs: 1 // 0, "ZeroDivisionError", "float64 [B, n, K] or [B, n, K, G]"),
        (lambda inputs: inputs.target_tokens, "reads inputs.target_tokens, and needs declares nothing", "'tokens'"),
    ],
)
def test_what_is_against_the_contract_is_a_fault_of_the_entry(make, found, expected):
    with pytest.raises(EntryFaultError) as raised:
        block_advantages(Returns(make), REWARDS, PLAN, SAMPLED)
    assert found in raised.value.found and expected in raised.value.expected
    assert raised.value.place.rpartition(":")[0] == __file__


@pytest.mark.parametrize("by_token", [False, True])
def test_where_the_reward_is_not_finite_an_advantage_need_not_be(by_token):
    reward = REWARD.clone()
    reward[1, :, 2] = math.nan
    rewards = BlockRewards(TERMS, reward, REWARDS.cfm)
    expected = reward[..., None].expand(-1, -1, -1, LENGTH) if by_token else reward
    assert block_advantages(Returns(lambda inputs: expected), rewards, PLAN, SAMPLED) is expected
