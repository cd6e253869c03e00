"""The implementations that a benchmark compares (naive baselines, this trainer): one step, timers, counts of each."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ebft_mega.apps.benchmark.case import BenchCase, BenchModel
from ebft_mega.apps.benchmark.counting import LabelledTimers
from ebft_mega.apps.benchmark.naive_step import NaiveTrainer, naive_step
from ebft_mega.apps.benchmark.step_major import DenseKernel
from ebft_mega.architecture.partition import StageShape
from ebft_mega.checkpoint.initial_model import open_weights
from ebft_mega.config.schema import Reuse, RunConfig
from ebft_mega.cost.naive_cost import cost_of_naive_step
from ebft_mega.cost.rollout_nodes import RolloutNodes
from ebft_mega.cost.step_cost import StepShape, cost_of_step
from ebft_mega.cost.work import StepCost
from ebft_mega.critic.critic_factory import build_critic
from ebft_mega.critic.fitted_critic import FittedCritic
from ebft_mega.data.rows.loader import fixed_rows
from ebft_mega.data.store.opening import open_dataset
from ebft_mega.lifecycle.build import build_trainer
from ebft_mega.model.stage import Stage
from ebft_mega.model.weights.stage_weights import load_weights
from ebft_mega.model.weights.weight_sources import RandomWeights, WeightSource
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.rollout.generate import SamplingSettings
from ebft_mega.train.step import observe_step, train_step
from ebft_mega.train.trainer import Trainer
from ebft_mega.types import DTYPES, Experience, TokenBatch


@dataclass(frozen=True)
class Baseline:
    """A variant of the baseline."""

    kernel: DenseKernel
    checkpoints_layers: bool = False  # keeps only layer inputs for the backward pass


@dataclass(frozen=True)
class Ours:
    """A variant of this trainer."""

    reuse: Reuse  # `learn.reuse_rollout`
    merges: bool = True  # `ebft.merge_equal_prefixes`
    estimator: str | None = None  # `ebft.advantage_estimator`, see `BenchCase.config`


# Names of sides: those of the baseline, and those of this trainer.
NAIVE_SIDES = {
    "naive": Baseline("eager"),
    "naive_checkpointing": Baseline("eager", checkpoints_layers=True),
    "naive_sdpa": Baseline("sdpa"),
}
OUR_SIDES = {
    "ours": Ours("checkpoints"),
    "ours_unmerged": Ours("checkpoints", merges=False),
    "ours_activations": Ours("activations"),
    "ours_activations_unmerged": Ours("activations", merges=False),
    "ours_off": Ours("off"),
    "ours_inner_products": Ours("checkpoints", estimator="rloo"),
    "ours_critic": Ours("checkpoints", estimator="token_critic"),
}
# What a side is compared with beside the baseline, in the same run.
COUNTERPARTS = {name: f"{name}_unmerged" for name in OUR_SIDES} | {"ours_critic": "ours_inner_products"}


@dataclass(frozen=True)
class StepDone:
    """What is known of a step after it has run."""

    grad_norm: float
    nodes: tuple[RolloutNodes, ...]  # of each row's rollouts, as far as rollouts that begin alike were merged

    @classmethod
    def of(cls, grad_norm: float, experiences: Sequence[Experience]) -> "StepDone":
        """Count the nodes of the forests that were sampled."""
        forests = [experience.rollout.forest for experience in experiences]
        rows = [RolloutNodes.of_forest(forest.levels, forest.num_blocks) for forest in forests]
        return cls(grad_norm, tuple(nodes for of_forest in rows for nodes in of_forest))


@dataclass(frozen=True)
class Side:
    """One way to do the step of a case."""

    name: str
    run: Callable[[int], StepDone]  # run one step, whose number selects the noise
    warm_up: Callable[[], StepDone]  # run a step on rows of two blocks, which allocates the optimizer state
    timers: LabelledTimers
    shape: StepShape  # of its steps, as if no two rollouts began alike
    cost_of_row: Callable[[StepShape], StepCost]
    table: torch.Tensor | None = None  # of the token critic, vectors of tokens; None: it has none

    def cost(self, done: StepDone) -> StepCost:
        """The work of a step that has run, by the formulas."""
        return sum_of_rows(self.cost_of_row, self.shape, done.nodes)

    @property
    def merges(self) -> bool:
        """Whether it computes what rollouts begin with alike once."""
        return self.name in OUR_SIDES and OUR_SIDES[self.name].merges


def sum_of_rows(
    cost_of_row: Callable[[StepShape], StepCost], shape: StepShape, nodes: Sequence[RolloutNodes]
) -> StepCost:
    """The work of a step on several rows, each with its own nodes."""
    costs = [cost_of_row(dataclasses.replace(shape, nodes=of_row)) for of_row in nodes]
    return functools.reduce(StepCost.__add__, costs)


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
        baseline, ours = NAIVE_SIDES.get(name), OUR_SIDES.get(name, Ours("off", merges=False))
        timers = LabelledTimers(torch.cuda.synchronize if self._groups.device.type == "cuda" else None)
        checkpoints_layers = baseline is not None and baseline.checkpoints_layers
        trainer = self._trainer(checkpoints_layers)
        config = self._case.config(self._model, ours.reuse, checkpoints_layers, ours.estimator, ours.merges)
        sampling, critic = SamplingSettings.of(config), self._critic(config)
        trainer = dataclasses.replace(
            trainer, config=config, timers=timers, reuse=ours.reuse, sampling=sampling, critic=critic
        )
        shape = StepShape.of(trainer.config, self._architecture, self._architecture)
        cost: Callable[[StepShape], StepCost] = functools.partial(cost_of_step, reuse=ours.reuse)
        if baseline is not None:
            keeps_weights, again = baseline.kernel == "eager", baseline.checkpoints_layers
            cost = functools.partial(cost_of_naive_step, checkpoints_layers=again, keeps_weights=keeps_weights)
        short_case = self._case.of_two_blocks()
        short_config = short_case.config(self._model, ours.reuse, checkpoints_layers, ours.estimator, ours.merges)
        short_trainer = dataclasses.replace(
            trainer, config=short_config, plan=short_config.block_plan, critic=self._critic(short_config)
        )
        short_rows = random_rows(short_case, self._architecture.vocab_size)
        if trainer.critic is not None and short_trainer.critic is not None:  # a critic is used once it is fitted
            observe_step(short_trainer, short_rows.to(self._groups.device), 0)
            trainer.critic.restore(short_trainer.critic.state)
        warm_up = functools.partial(self._steps(short_rows, short_trainer, baseline), 0)
        table = None if trainer.critic is None else trainer.critic.table
        return Side(name, self._steps(self._rows, trainer, baseline), warm_up, timers, shape, cost, table)

    def _steps(self, rows: TokenBatch, trainer: Trainer, baseline: Baseline | None) -> Callable[[int], StepDone]:
        rows = rows.to(self._groups.device)
        if baseline is None:

            def ours(step: int) -> StepDone:
                result = train_step(trainer, rows, step, 0.0)
                return StepDone.of(result.update.grad_norm, result.experiences)

            return ours
        network = NaiveTrainer(trainer, self._whole_network, baseline.kernel)

        def naive(step: int) -> StepDone:
            found = naive_step(network, rows, step, 0.0)
            return StepDone.of(found.grad_norm, found.experiences)

        return naive

    @functools.cached_property
    def _rows(self) -> TokenBatch:
        """The rows of every step: of the model's text, if it has one."""
        if self._model.data is None:
            return random_rows(self._case, self._architecture.vocab_size)
        dataset = open_dataset(Path(self._model.data))
        try:
            return fixed_rows(dataset, self._case.sequence_length, self._case.rows)
        finally:
            dataset.close()

    def _trainer(self, checkpoints_layers: bool) -> Trainer:
        """The trainer with or without activation checkpointing, which its stages are built for."""
        if checkpoints_layers not in self._trainers:
            config = self._case.config(self._model, "off", checkpoints_layers)
            trainer = build_trainer(config, self._architecture, self._architecture, self._groups)
            self._trainers[checkpoints_layers] = trainer
        return self._trainers[checkpoints_layers]

    def _critic(self, config: RunConfig) -> FittedCritic | None:
        features = self._trainer(False).feature_network
        return build_critic(config, self._architecture, self._weights(config.seed), features, self._groups)

    @functools.cached_property
    def _whole_network(self) -> Stage:
        """The baseline's feature network, which has all layers and the head."""
        config = self._case.config(self._model, "off")
        stage = Stage(
            self._architecture, StageShape.whole(self._architecture), self._groups, DTYPES[config.train.dtype]
        )
        load_weights(stage, self._weights(config.seed))
        return stage.to(self._groups.device).requires_grad_(False).eval()

    def _weights(self, seed: int) -> WeightSource:
        directory = self._model.directory
        if directory is None:
            return RandomWeights(self._architecture, seed)
        return open_weights(Path(directory), self._architecture)


def random_rows(case: BenchCase, vocab_size: int) -> TokenBatch:
    """Make rows of random tokens; without merging, counts and times do not depend on their values."""
    generator = torch.Generator().manual_seed(case.sequence_length)
    tokens = torch.randint(vocab_size, (case.rows, case.sequence_length), generator=generator)
    return TokenBatch(tokens, torch.zeros_like(tokens), torch.arange(case.rows))
