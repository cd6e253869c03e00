"""The sides of a comparison: each a function that runs one step, with its timers and its exact counts."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ebft_mega.benchmark.case import BenchCase, architecture_of
from ebft_mega.benchmark.counting import LabelledTimers
from ebft_mega.benchmark.naive import NaiveTrainer, naive_step
from ebft_mega.benchmark.step_major import DenseKernel
from ebft_mega.cost.naive import cost_of_naive_step
from ebft_mega.cost.ours import Reuse, StepShape, cost_of_step
from ebft_mega.cost.work import StepCost
from ebft_mega.model.huggingface import RandomWeights, load_weights
from ebft_mega.model.partition import StageShape
from ebft_mega.model.stage import Stage
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.train.run import build_trainer
from ebft_mega.train.step import Trainer, train_step
from ebft_mega.types import DTYPES, TokenBatch

# Names of sides: the baseline by its attention, ours by what learning takes over from the rollout phase.
NAIVE_SIDES: dict[str, DenseKernel] = {"naive": "eager", "naive_sdpa": "sdpa"}
OUR_SIDES: dict[str, Reuse] = {"ours": "checkpoints", "ours_activations": "activations", "ours_off": "off"}


@dataclass(frozen=True)
class Side:
    """One way to do the step of a case."""

    name: str
    run: Callable[[int], float]  # one step with that number's noise; returns the gradient's norm
    warm_up: Callable[[], float]  # a step on a row of two blocks: afterwards the optimizer has its state
    timers: LabelledTimers
    cost: StepCost


def build_side(name: str, case: BenchCase, model: dict[str, Any], groups: ProcessGroups) -> Side:
    """Make a side from nothing: the same seed gives all sides the same weights, which a learning rate of 0 keeps.

    Args:
        name: of `NAIVE_SIDES` or `OUR_SIDES`.
        groups: of a job of one process.
    """
    is_naive = name in NAIVE_SIDES
    reuse = OUR_SIDES.get(name, "off")
    config = case.config(model, reuse)
    architecture = architecture_of(model)
    timers = LabelledTimers(torch.cuda.synchronize if groups.device.type == "cuda" else None)
    trainer = build_trainer(config, architecture, architecture, groups)
    trainer = dataclasses.replace(trainer, timers=timers, reuse=reuse)
    shape = StepShape.of(config, architecture, architecture)
    if is_naive:
        frozen = Stage(architecture, StageShape.whole(architecture), groups, DTYPES[config.train.dtype])
        load_weights(frozen, RandomWeights(architecture, config.seed))
        frozen.to(groups.device).requires_grad_(False).eval()
        cost = cost_of_naive_step(shape)
    else:
        cost = cost_of_step(shape, reuse)

    def on_rows_of(case: BenchCase, trainer: Trainer) -> Callable[[int], float]:
        rows = random_rows(case, architecture.vocab_size).to(groups.device)
        if not is_naive:
            return lambda step: train_step(trainer, rows, step, 0.0).update.grad_norm
        naive = NaiveTrainer(trainer, frozen, NAIVE_SIDES[name])
        return lambda step: naive_step(naive, rows, step, 0.0).grad_norm

    short_case = case.of_two_blocks()
    short_config = short_case.config(model, reuse)
    short_trainer = dataclasses.replace(trainer, config=short_config, plan=short_config.block_plan)
    warm_up = functools.partial(on_rows_of(short_case, short_trainer), 0)
    return Side(name, on_rows_of(case, trainer), warm_up, timers, cost)


def random_rows(case: BenchCase, vocab_size: int) -> TokenBatch:
    """One row of random tokens: what they are changes no count and no time."""
    generator = torch.Generator().manual_seed(case.sequence_length)
    tokens = torch.randint(vocab_size, (1, case.sequence_length), generator=generator)
    return TokenBatch(tokens, torch.zeros_like(tokens), torch.zeros(1, dtype=torch.int64))
