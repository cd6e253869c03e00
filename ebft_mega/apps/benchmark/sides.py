"""The implementations that a benchmark compares (naive baselines, this trainer): one step, timers, counts of each."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ebft_mega.apps.benchmark.case import BenchCase, BenchModel
from ebft_mega.apps.benchmark.counting import LabelledTimers
from ebft_mega.apps.benchmark.naive_step import NaiveTrainer, naive_step
from ebft_mega.apps.benchmark.step_major import DenseKernel
from ebft_mega.architecture.partition import StageShape
from ebft_mega.config.schema import Reuse
from ebft_mega.cost.naive_cost import cost_of_naive_step
from ebft_mega.cost.step_cost import StepShape, cost_of_step
from ebft_mega.cost.work import StepCost
from ebft_mega.lifecycle.build import build_trainer
from ebft_mega.model.stage import Stage
from ebft_mega.model.weights.stage_weights import load_weights
from ebft_mega.model.weights.weight_sources import RandomWeights
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.train.step import Trainer, train_step
from ebft_mega.types import DTYPES, TokenBatch


@dataclass(frozen=True)
class Baseline:
    """A variant of the baseline."""

    kernel: DenseKernel
    checkpoints_layers: bool = False  # keeps only layer inputs for the backward pass


# Names of sides: those of the baseline, and those of this trainer by `learn.reuse_rollout`.
NAIVE_SIDES = {
    "naive": Baseline("eager"),
    "naive_checkpointing": Baseline("eager", checkpoints_layers=True),
    "naive_sdpa": Baseline("sdpa"),
}
OUR_SIDES: dict[str, Reuse] = {"ours": "checkpoints", "ours_activations": "activations", "ours_off": "off"}


@dataclass(frozen=True)
class Side:
    """One way to do the step of a case."""

    name: str
    run: Callable[[int], float]  # run one step, whose number selects the noise; returns the gradient norm
    warm_up: Callable[[], float]  # run a step on a row of two blocks, which allocates the optimizer state
    timers: LabelledTimers
    cost: StepCost


def build_sides(names: Sequence[str], case: BenchCase, model: BenchModel, groups: ProcessGroups) -> dict[str, Side]:
    """Make sides that share the same weights; a learning rate of 0 keeps them unchanged.

    Args:
        names: of `NAIVE_SIDES` and `OUR_SIDES`.
        groups: of a job of one process.
    """
    built = _Builder(case, model, groups)
    return {name: built.side(name) for name in names}


class _Builder:
    """Make the sides of a case; objects that they share are made once."""

    def __init__(self, case: BenchCase, model: BenchModel, groups: ProcessGroups):
        self._case, self._model, self._groups = case, model, groups
        self._architecture = model.architecture
        self._trainers: dict[bool, Trainer] = {}

    def side(self, name: str) -> Side:
        baseline, reuse = NAIVE_SIDES.get(name), OUR_SIDES.get(name, "off")
        timers = LabelledTimers(torch.cuda.synchronize if self._groups.device.type == "cuda" else None)
        checkpoints_layers = baseline is not None and baseline.checkpoints_layers
        trainer = dataclasses.replace(self._trainer(checkpoints_layers), timers=timers, reuse=reuse)
        shape = StepShape.of(trainer.config, self._architecture, self._architecture)
        if baseline is None:
            cost = cost_of_step(shape, reuse)
        else:
            cost = cost_of_naive_step(shape, baseline.checkpoints_layers, keeps_weights=baseline.kernel == "eager")
        short_case = self._case.of_two_blocks()
        short_config = short_case.config(self._model, reuse, checkpoints_layers)
        short_trainer = dataclasses.replace(trainer, config=short_config, plan=short_config.block_plan)
        warm_up = functools.partial(self._steps(short_case, short_trainer, baseline), 0)
        return Side(name, self._steps(self._case, trainer, baseline), warm_up, timers, cost)

    def _steps(self, case: BenchCase, trainer: Trainer, baseline: Baseline | None) -> Callable[[int], float]:
        rows = random_rows(case, self._architecture.vocab_size).to(self._groups.device)
        if baseline is None:
            return lambda step: train_step(trainer, rows, step, 0.0).update.grad_norm
        naive = NaiveTrainer(trainer, self._whole_network, baseline.kernel)
        return lambda step: naive_step(naive, rows, step, 0.0).grad_norm

    def _trainer(self, checkpoints_layers: bool) -> Trainer:
        """The trainer with or without activation checkpointing, which its stages are built for."""
        if checkpoints_layers not in self._trainers:
            config = self._case.config(self._model, "off", checkpoints_layers)
            trainer = build_trainer(config, self._architecture, self._architecture, self._groups)
            self._trainers[checkpoints_layers] = trainer
        return self._trainers[checkpoints_layers]

    @functools.cached_property
    def _whole_network(self) -> Stage:
        """The baseline's feature network, which has all layers and the head."""
        config = self._case.config(self._model, "off")
        stage = Stage(
            self._architecture, StageShape.whole(self._architecture), self._groups, DTYPES[config.train.dtype]
        )
        load_weights(stage, RandomWeights(self._architecture, config.seed))
        return stage.to(self._groups.device).requires_grad_(False).eval()


def random_rows(case: BenchCase, vocab_size: int) -> TokenBatch:
    """Make one row of random tokens; counts and times do not depend on their values."""
    generator = torch.Generator().manual_seed(case.sequence_length)
    tokens = torch.randint(vocab_size, (1, case.sequence_length), generator=generator)
    return TokenBatch(tokens, torch.zeros_like(tokens), torch.zeros(1, dtype=torch.int64))
