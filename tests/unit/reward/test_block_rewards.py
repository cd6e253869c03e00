"""Terms of entries outside the package: what they are given, their sum, and every way not to hold the contract."""

import math

import pytest
import torch

from ebft_mega.extension.entry_fault import EntryFaultError
from ebft_mega.extension.reward_term import RewardTerm
from ebft_mega.reward.block_inputs import BlockInputs
from ebft_mega.reward.block_rewards import block_rewards
from ebft_mega.reward.sampled_blocks import SampledBlocks
from ebft_mega.reward.terms.alignment import Alignment
from tests.own_entries import Letters, Matches, Surprise, letters_of
from tests.unit.reward.rewards import plan_of

ROWS, SAMPLES, BLOCKS, LENGTH = 2, 4, 3, 2
PLAN = plan_of(SAMPLES, BLOCKS, LENGTH)
GRAM_SHAPE = (ROWS, BLOCKS, SAMPLES + 1, SAMPLES + 1)


def inputs_of(spoiled: bool = False) -> BlockInputs:
    """Random features and tokens of three kinds, so that some are equal; with `spoiled` block 1 of row 0 is marked."""
    draws = torch.Generator().manual_seed(0)
    features = torch.randn(ROWS, BLOCKS, SAMPLES + 1, 8, dtype=torch.float64, generator=draws)
    gram = features @ features.transpose(-1, -2)
    if spoiled:
        gram[0, 1, 2, 2] = torch.nan
    rollouts = torch.randint(0, 3, (ROWS, SAMPLES, BLOCKS, LENGTH), generator=draws)
    rows = torch.randint(0, 3, (ROWS, PLAN.sequence_length), generator=draws)
    logprobs = -torch.rand(rollouts.shape, generator=draws)
    return BlockInputs.of(gram, "sample", PLAN, SampledBlocks(PLAN, rollouts, rows, logprobs, letters_of))


def test_terms_read_what_was_sampled_and_are_added_up_in_their_order():
    inputs = inputs_of()
    sampled = inputs.sampled
    terms = [(Alignment(), 1.0), (Matches(Matches.Options(first=1)), 0.5), (Surprise(), -0.25), (Letters(), 2.0)]
    rewards = block_rewards(inputs, terms)
    assert list(rewards.terms) == ["alignment", "matches", "surprise", "letters"]
    found = {name: term.values for name, term in rewards.terms.items()}
    assert {name: term.coefficient for name, term in rewards.terms.items()} == {
        **{"alignment": 1.0, "matches": 0.5},
        **{"surprise": -0.25, "letters": 2.0},
    }
    assert rewards.terms["surprise"].baseline == "none"
    expected = found["alignment"] + 0.5 * found["matches"] + -0.25 * found["surprise"] + 2.0 * found["letters"]
    assert torch.equal(rewards.reward, expected)
    assert torch.equal(found["alignment"], block_rewards(inputs, terms[:1]).terms["alignment"].values)
    seen = set()
    for row in range(ROWS):
        for block, anchor in enumerate(PLAN.anchors):
            target = sampled.row_tokens[row, anchor : anchor + LENGTH].tolist()
            windows = sampled.rollout_tokens[row, :, block].tolist()
            for sample, window in enumerate(windows):
                place, first = (row, sample, block), (row, windows.index(window), block)
                seen.add(place == first)
                assert found["matches"][place] == (window[1] == target[1])
                letters = [letter in letters_of(target) for letter in letters_of(window)]
                assert found["letters"][place] == sum(letters)
                # Log-probabilities of equal rollouts may be rounded differently; the first one's are taken.
                assert found["surprise"][place].item() == -sampled.logprobs[first].double().mean().item()
    assert seen == {True, False}


def test_rollouts_of_equal_features_keep_their_own_tokens():
    """Features of zeros are equal whatever the tokens; terms that look at the features alone take the first one's."""
    inputs = inputs_of()
    inputs = BlockInputs.of(torch.zeros(GRAM_SHAPE, dtype=torch.float64), "sample", PLAN, inputs.sampled)
    expected = inputs.sampled.rollout_tokens[..., 1:] == inputs.sampled.target_tokens[:, None, :, 1:]
    found = block_rewards(inputs, [(Matches(Matches.Options(first=1)), 1.0)]).terms["matches"].values
    assert torch.equal(found, expected[..., 0].double()) and found.unique().numel() == 2


class Returns(RewardTerm):
    """Whatever it is made with."""

    name = "returns"

    def __init__(self, make, needs=()):
        super().__init__()
        self.make, self.needs = make, frozenset(needs)

    def values(self, inputs):
        return self.make(inputs)


ZEROS = torch.zeros(ROWS, SAMPLES, BLOCKS, dtype=torch.float64)
SHAPE = "a float64 tensor [B, n, K] = [2, 4, 3] on cpu"


def spoilt(value):
    values = ZEROS.clone()
    values[1, 2, 0] = value
    return values


def raising(inputs):
    raise KeyError("no such word")


HERE = raising.__code__.co_firstlineno + 1


@pytest.mark.parametrize(
    ("make", "found", "expected"),
    [
        (lambda inputs: ZEROS[:, :1], "a float64 tensor [2, 1, 3] on cpu", SHAPE),
        (lambda inputs: ZEROS.transpose(1, 2), "a float64 tensor [2, 3, 4] on cpu", SHAPE),
        (lambda inputs: ZEROS.float(), "a float32 tensor [2, 4, 3] on cpu", SHAPE),
        (lambda inputs: ZEROS.to("meta"), "a float64 tensor [2, 4, 3] on meta", SHAPE),
        (lambda inputs: ZEROS.tolist(), "a list", SHAPE),
        (lambda inputs: None, "a NoneType", SHAPE),
        (
            lambda inputs: spoilt(math.nan),
            "nan at row 1, sample 2, block 0 of a micro-batch, 1 values in all",
            "finite",
        ),
        (lambda inputs: spoilt(-math.inf), "-inf at row 1, sample 2, block 0", "finite values"),
        (raising, "KeyError: 'no such word'", "float64 [B, n, K]"),
        (
            lambda inputs: inputs.rollout_tokens,
            "reads inputs.rollout_tokens, and needs declares nothing",
            "'tokens' in",
        ),
        (lambda inputs: inputs.target_texts, "reads inputs.target_texts, and needs declares nothing", "'texts' in"),
        (lambda inputs: inputs.logprobs, "reads inputs.logprobs, and needs declares nothing", "'logprobs' in needs"),
        (lambda inputs: inputs.rows, "AttributeError", "float64"),
    ],
)
def test_what_is_against_the_contract_is_a_fault_of_the_entry(make, found, expected):
    with pytest.raises(EntryFaultError) as raised:
        block_rewards(inputs_of(), [(Returns(make), 1.0)])
    fault = raised.value
    assert found in fault.found and expected in fault.expected and fault.entry.name == "returns"
    file, _, line = fault.place.rpartition(":")
    assert file == __file__
    if make is raising:
        assert int(line) == HERE  # where it raised, not where the class begins


def test_a_declared_need_is_another_one():
    with pytest.raises(EntryFaultError, match="rollout_texts, and needs declares logprobs, tokens"):
        block_rewards(inputs_of(), [(Returns(lambda inputs: inputs.rollout_texts, ("tokens", "logprobs")), 1.0)])


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("no memory")])
def test_running_out_of_memory_is_no_fault_of_an_entry(error):
    def fail(inputs):
        raise error

    with pytest.raises(type(error)):
        block_rewards(inputs_of(), [(Returns(fail), 1.0)])


def test_in_a_marked_block_anything_is_taken_and_becomes_nan():
    def values(inputs):
        assert inputs.gram.isfinite().all() and inputs.products.cosine.isfinite().all()
        found = ZEROS + 3
        found[0, :, 1] = math.inf
        return found

    found = block_rewards(inputs_of(spoiled=True), [(Alignment(), 1.0), (Returns(values), 1.0)])
    for tensor in (found.reward, *(term.values for term in found.terms.values())):
        marked = torch.zeros_like(tensor, dtype=torch.bool)
        marked[0, :, 1] = True
        assert tensor[marked].isnan().all() and tensor[~marked].isfinite().all()


def test_a_reward_has_a_term():
    with pytest.raises(ValueError, match="at least one term"):
        block_rewards(inputs_of(), [])
