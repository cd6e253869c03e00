"""What the token critic learns from, and what it does not: steps that are skipped, and what does not count."""

import dataclasses
import math

import pytest
import torch

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.critic.fitted_critic import CriticState
from ebft_mega.features.network import FeatureNetwork
from ebft_mega.lifecycle.build import build_trainer
from ebft_mega.rollout.packed_order import counted_blocks
from ebft_mega.train import gradient_pass
from ebft_mega.train.step import train_step
from ebft_mega.train.trainer import Trainer
from tests.distributed.steps import CRITIC, LEARNING_RATE, MASKING, Case, config_of, rows_of_step

UNCOUNTED = Case("uncounted", (*CRITIC, MASKING, "train.micro_batch_size=2"), filler=(0, 2))


@pytest.fixture(autouse=True)
def job_of_one(monkeypatch):
    """What DeepSpeed reads of the environment."""
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)


def build(groups, directory, case: Case) -> Trainer:
    config = config_of(case, str(directory), ("data.on_error=skip",))
    architecture = Architecture.from_hf(config.model.config, "test")
    return build_trainer(config, architecture, architecture, groups)


def take(trainer: Trainer, step: int, case: Case) -> bool:
    """Whether a step was applied."""
    return train_step(trainer, rows_of_step(step, trainer.groups, case), step, LEARNING_RATE).update.applied


def copied(state: CriticState) -> tuple[int, list[torch.Tensor]]:
    """Batches, and copies of all numbers."""
    weights = state.weights
    learned = [] if weights is None else [weights.prefix, weights.token]
    tensors = [state.table, state.statistics.squares, state.statistics.products, *learned]
    return state.batches, [tensor.clone() for tensor in tensors]


def same(first: tuple[int, list[torch.Tensor]], second: tuple[int, list[torch.Tensor]]) -> bool:
    pairs = zip(first[1], second[1], strict=True)
    return first[0] == second[0] and all(torch.equal(*pair) for pair in pairs)


def spoiled(where: str):
    """A loss whose value or gradient is not finite."""
    original = gradient_pass.loss_terms

    def loss_terms(*arguments):
        terms = original(*arguments)
        if where == "gradient":
            terms.total.register_hook(lambda gradient: gradient * math.nan)
            return terms
        return dataclasses.replace(terms, total=terms.total + math.inf)

    return loss_terms


def test_a_skipped_step_teaches_nothing(groups, tmp_path, monkeypatch):
    """The state is the same bit for bit, and the step after it is what it would have been."""
    case = Case("skipped", (*CRITIC, "train.micro_batch_size=4"))
    trainer, twin = build(groups, tmp_path, case), build(groups, tmp_path, case)
    for each in (trainer, twin):
        assert take(each, 0, case) and each.critic.state.batches == 1 and each.critic.state.weights is not None
    before = copied(trainer.critic.state)
    for where in ("gradient", "loss"):
        with monkeypatch.context() as patch:
            patch.setattr(gradient_pass, "loss_terms", spoiled(where))
            assert not take(trainer, 7, case)
        assert same(copied(trainer.critic.state), before), where
    for each in (trainer, twin):
        assert take(each, 1, case)
    assert trainer.critic.state.batches == 2 and not same(copied(trainer.critic.state), before)
    assert same(copied(trainer.critic.state), copied(twin.critic.state))


def test_what_does_not_count_teaches_nothing(groups, tmp_path, monkeypatch):
    """Features of filler rows, and of blocks across documents, may be anything."""
    original, num_spoiled = FeatureNetwork.grams, []

    def grams(network, batches, rollouts, plan, take):
        def spoil(index, own):
            dropped = ~counted_blocks(batches[index], plan)
            num_spoiled.append(int(dropped.sum()))
            vectors = own.vectors.masked_fill(dropped[..., None, None], math.nan)
            tokens = own.tokens.masked_fill(dropped[..., None, None, None], math.nan)
            take(index, dataclasses.replace(own, vectors=vectors, tokens=tokens))

        return original(network, batches, rollouts, plan, spoil)

    states = []
    for spoils in (False, True):
        trainer = build(groups, tmp_path, UNCOUNTED)
        monkeypatch.setattr(FeatureNetwork, "grams", grams if spoils else original)
        assert all(take(trainer, step, UNCOUNTED) for step in range(3))
        states.append(copied(trainer.critic.state))
    assert sum(num_spoiled) > 6 and states[0][0] == 3 and same(*states)
    before = copied(trainer.critic.state)
    nothing = dataclasses.replace(UNCOUNTED, filler=(0, 1, 2, 3))
    assert take(trainer, 3, nothing) and same(copied(trainer.critic.state), before)  # applied, and nothing in it counts
