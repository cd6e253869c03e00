"""Entries outside the package on two ranks: the same in every layout, and one message on all ranks after a fault.

The two tests start two ranks once each; the layouts are made one after another in the same processes.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.errors import EntryError
from ebft_mega.extension.advantage_estimator import AdvantageEstimator
from ebft_mega.extension.reward_term import RewardTerm
from ebft_mega.lifecycle.build import build_trainer
from ebft_mega.parallel.groups import connect, make_process_groups
from ebft_mega.train.step import train_step
from ebft_mega.train.step_metrics import step_metrics
from ebft_mega.train.step_trace import _gather_rows, _local_tensors
from tests.distributed.ranks import run_ranks
from tests.distributed.steps import LEARNING_RATE, MASKING, Case, Layout, config_of, rows_of_step
from tests.own_entries import in_registries, letters_of

TERMS = "ebft.reward_terms={matches: 0.5, surprise: -0.25, letters: 0.125}"
OVERRIDES = (TERMS, "ebft.advantage_estimator=later", "options={matches: {first: 1}}", "train.micro_batch_size=2")
LAYOUTS = {
    "dp2": (Layout(2, 1, 1), ("learn.reuse_rollout=activations", "zero.hold_parameters=step")),
    "tp2": (Layout(1, 2, 1), ("learn.reuse_rollout=off",)),
    "pp2": (Layout(1, 1, 2), ("learn.reuse_rollout=checkpoints",)),
}
ALPHA, BETA = 1.0, -1.0  # coefficients of the package's own terms


def trainer_of(case: Case, layout: Layout, directory: str, device: torch.device):
    groups = make_process_groups(device, layout.tensor, layout.pipeline)
    config = config_of(case, directory, layout.overrides)
    architecture = Architecture.from_hf(config.model.config, "test")
    return replace(build_trainer(config, architecture, architecture, groups), decode=letters_of)


def one_step_of_each_layout(directory: str) -> dict[str, tuple[dict, dict]]:
    """Tensors of the whole step and its metrics, by layout."""
    device, found = connect(), {}
    with in_registries():
        for name, (layout, overrides) in LAYOUTS.items():
            case = Case(name, (*OVERRIDES, *overrides, *([MASKING] if layout.data == 2 else [])))
            trainer = trainer_of(case, layout, directory, device)
            masked = Case(name, (MASKING,)) if layout.data == 2 else None
            result = train_step(trainer, rows_of_step(0, trainer.groups, masked), 0, LEARNING_RATE)
            metrics = step_metrics(trainer, result, LEARNING_RATE)
            found[name] = (_gather_rows(_local_tensors(result), trainer.groups), metrics)
    return found


def test_every_layout_gives_entries_the_same(tmp_path):
    by_rank = run_ranks(2, one_step_of_each_layout, str(tmp_path))
    first = by_rank[0]
    for name, (tensors, metrics) in first.items():
        others, other_metrics = by_rank[1][name]
        assert other_metrics == metrics, name
        assert all(torch.equal(others[key], tensors[key]) for key in tensors), name
        check_step(tensors, metrics)
    (tensors, metrics), (others, other_metrics) = first["tp2"], first["pp2"]
    for key in ("rollouts", "matches", "letters"):
        assert torch.equal(others[key], tensors[key]), key
    for key in ("surprise", "reward", "advantage", "logprobs"):
        torch.testing.assert_close(others[key], tensors[key], rtol=1e-4, atol=1e-5)
    for key, value in metrics.items():
        # How much of a row the policy's pass holds depends on the way of reuse, and so does what need not be computed.
        tolerance = 0.05 if key.startswith("perf/distinct_rows_share/") else 1e-5
        assert other_metrics[key] == pytest.approx(value, rel=1e-3, abs=tolerance), key


def check_step(tensors: dict, metrics: dict) -> None:
    """Terms, reward, advantages, loss and metrics of a step, from its tokens and log-probabilities alone."""
    rollouts, rows = tensors["rollouts"], tensors["tokens"]
    assert list(tensors)[3:8] == ["alignment", "diversity", "matches", "surprise", "letters"]
    num_rows, _, num_blocks, length = rollouts.shape
    counted = tensors.get("kept", torch.ones(num_rows, num_blocks)).bool()
    targets = torch.stack([rows[:, 4 + 4 * block : 4 + 4 * block + length] for block in range(num_blocks)], dim=1)
    equal = rollouts == targets[:, None]
    assert torch.equal(tensors["matches"], equal[..., 1:].double().mean(dim=-1))
    assert 0 < tensors["matches"].mean() < 1 or not equal[..., 1:].any()
    for row, sample, block in ((0, 0, 0), (1, 2, 3), (3, 1, 4)):
        text, target = letters_of(rollouts[row, sample, block].tolist()), letters_of(targets[row, block].tolist())
        assert tensors["letters"][row, sample, block] == sum(letter in target for letter in text)
    torch.testing.assert_close(tensors["surprise"], -tensors["logprobs"].double().mean(dim=-1), rtol=1e-5, atol=1e-5)
    reward = ALPHA * tensors["alignment"] + BETA * tensors["diversity"] + 0.5 * tensors["matches"]
    reward = reward - 0.25 * tensors["surprise"] + 0.125 * tensors["letters"]
    torch.testing.assert_close(tensors["reward"], reward, rtol=1e-12, atol=1e-12)
    weights = torch.arange(1, length + 1) * (1 + equal.double())
    advantages = (reward[..., None] * weights) * counted[:, None, :, None]
    torch.testing.assert_close(tensors["advantage"], advantages, rtol=1e-12, atol=1e-12)
    blocks = counted.sum()
    loss = -(advantages * tensors["logprobs"] * counted[:, None, :, None]).sum() / (blocks * rollouts.shape[1] * length)
    assert metrics["ebft/rl_loss"] == pytest.approx(loss.item(), rel=1e-5)
    of_counted = advantages.transpose(1, 2)[counted]
    assert metrics["ebft/advantages_std"] == pytest.approx(of_counted.std(correction=0).item(), rel=1e-9)
    for name in ("matches", "surprise", "letters"):
        expected = tensors[name].transpose(1, 2)[counted].mean().item()
        assert metrics[f"ebft/{name}"] == pytest.approx(expected, rel=1e-9), name


class Faulty(RewardTerm):
    """Zeros, but for one rank that does what it is told to."""

    name = "faulty"
    told = None

    def values(self, inputs):
        batch, blocks, size = inputs.gram.shape[:3]
        zeros = torch.zeros(batch, size - 1, blocks, dtype=torch.float64)
        return self.told(inputs, zeros) if dist.get_rank() == 1 and self.told else zeros


class FaultyEstimator(AdvantageEstimator):
    """As the term."""

    name = "faulty"
    told = None

    def advantages(self, inputs):
        reward = inputs.rewards.reward
        return self.told(inputs, reward) if dist.get_rank() == 1 and self.told else reward


def raises(inputs, zeros):
    raise ValueError("no word for\nthis \x1b[2J")


FAULTS = {
    "shape": (lambda inputs, zeros: zeros[:1, :, :0], "found a float64 tensor [1, 3, 0] on cpu; expected a float64"),
    "dtype": (lambda inputs, zeros: zeros.float(), "found a float32 tensor"),
    "finite": (lambda inputs, zeros: zeros + math.nan, "found nan at row 0, sample 0, block 0"),
    "raises": (raises, "found ValueError: no word for"),
    "undeclared": (lambda inputs, zeros: inputs.rollout_texts, "found that it reads inputs.rollout_texts, and needs"),
}
CASE = Case("faulty", ("ebft.reward_terms={faulty: 1.0}", "ebft.advantage_estimator=faulty"))


def every_fault(directory: str) -> dict[str, str]:
    """What each fault of the second rank's entries raises on this one, by its name; then a step without any."""
    device, found = connect(), {}
    with in_registries(Faulty, FaultyEstimator):
        trainer = trainer_of(CASE, Layout(2, 1, 1), directory, device)
        rows = rows_of_step(0, trainer.groups)
        for kind in (Faulty, FaultyEstimator):
            for name, (told, _) in FAULTS.items():
                kind.told = staticmethod(told)
                with pytest.raises(EntryError) as raised:
                    train_step(trainer, rows, 0, LEARNING_RATE)
                found[f"{kind.__name__} {name}"] = str(raised.value)
            kind.told = None
        result = train_step(trainer, rows, 0, LEARNING_RATE)
        assert result.update.applied
    return found


def test_a_fault_of_one_rank_is_the_same_message_on_all_and_the_run_is_whole_until_then(tmp_path):
    first, second = run_ranks(2, every_fault, str(tmp_path))
    assert first == second and len(first) == 2 * len(FAULTS)
    for kind, key in ((Faulty, "ebft.reward_terms.faulty"), (FaultyEstimator, "ebft.advantage_estimator")):
        for name, (told, words) in FAULTS.items():
            message = first[f"{kind.__name__} {name}"]
            place, _, rest = message.partition(f": {key}: ")
            assert rest.startswith(words) and "\n" not in message and "\x1b" not in message, message
            assert place.startswith(f"--set: {__file__}:"), message
            if told is raises:
                assert place.endswith(f":{raises.__code__.co_firstlineno + 1}")
