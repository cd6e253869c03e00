"""An entry that changes what it is given is refused: the step uses it afterwards."""

import pytest
import torch

from ebft_mega.block_plan import BlockPlan
from ebft_mega.extension.entry_fault import EntryFaultError
from ebft_mega.extension.reward_term import RewardTerm
from ebft_mega.reward.block_inputs import BlockInputs
from ebft_mega.reward.block_rewards import block_rewards
from ebft_mega.reward.sampled_blocks import SampledBlocks

PLAN = BlockPlan(sequence_length=8, stride=2, context_length=2, generate_length=2, num_samples=2)


class Changing(RewardTerm):
    """Does to its inputs what the test says."""

    name = "changing"
    needs = frozenset({"tokens"})

    def __init__(self, change):
        super().__init__()
        self.change = change

    def values(self, inputs):
        self.change(inputs)
        return torch.zeros(1, 2, 3, dtype=torch.float64)


def rewards(change):
    gram = torch.eye(3, dtype=torch.float64).expand(1, 3, 3, 3).clone()
    sampled = SampledBlocks(PLAN, torch.zeros(1, 2, 3, 2, dtype=torch.int64), torch.arange(8)[None])
    inputs = BlockInputs.of(gram, "sample", PLAN, sampled)
    return block_rewards(inputs, [(Changing(change), 1.0)])


@pytest.mark.parametrize(
    "change",
    [
        lambda inputs: inputs.rollout_tokens.fill_(1),
        lambda inputs: inputs.target_tokens.zero_(),
        lambda inputs: inputs.gram.mul_(2),
        lambda inputs: inputs.products.cross[0, 0].zero_(),
    ],
)
def test_a_changed_input_is_a_fault(change):
    with pytest.raises(EntryFaultError, match=r"found that it changes what it is given; expected inputs as they were"):
        rewards(change)


def test_copies_may_be_changed():
    assert rewards(lambda inputs: inputs.rollout_tokens.clone().fill_(1)).reward.abs().sum() == 0


def test_leaving_the_process_is_a_fault():
    def leave(inputs):
        raise SystemExit(5)

    with pytest.raises(EntryFaultError, match="found SystemExit: 5"):
        rewards(leave)
