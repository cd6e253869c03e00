"""The loop around the step: batches in, metrics out, evaluations in between. It knows nothing of the algorithm."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ebft_mega.data.loader import BatchLoader
from ebft_mega.data.tokenizer import Tokenizer
from ebft_mega.errors import NonFiniteStepError
from ebft_mega.evaluation.heldout import Evaluation, EvaluationSettings, evaluate, gather
from ebft_mega.metrics.sinks import MetricsWriter
from ebft_mega.train.schedule import learning_rate
from ebft_mega.train.step import Trainer, train_step
from ebft_mega.train.summary import speed_metrics, step_metrics
from ebft_mega.types import TokenBatch

# A run in which no update was applied for so long will not recover by itself.
MAX_SKIPPED_IN_A_ROW = 10


@dataclass(frozen=True)
class HeldOut:
    """What evaluations look at, and when."""

    rows: TokenBatch  # this rank's rows
    settings: EvaluationSettings
    interval: int | None  # optimizer steps; None: only before the first and after the last


@dataclass(frozen=True)
class Observer:
    """Where the one writing rank puts what a person reads; None on other ranks."""

    writer: MetricsWriter
    samples_path: Path
    tokenizer: Tokenizer

    def show_blocks(self, step: int, evaluation: Evaluation) -> None:
        """Append a few rollouts beside their targets, as text."""
        decode = self.tokenizer.decode
        with self.samples_path.open("a", encoding="utf-8") as file:
            for block in evaluation.shown:
                record = {
                    "step": step,
                    "row": block.row,
                    "block": block.block,
                    "context": decode(block.context),
                    "target": decode(block.target),
                    "rollouts": [decode(rollout) for rollout in block.rollouts],
                    "alignment": block.alignment,
                }
                file.write(json.dumps(record) + "\n")


def train(
    trainer: Trainer,
    loader: BatchLoader,
    held_out: HeldOut | None,
    total_steps: int,
    observer: Observer | None,
) -> None:
    """Run all optimizer steps.

    Raises:
        NonFiniteStepError: `MAX_SKIPPED_IN_A_ROW` updates in a row were skipped by all ranks.
        DamagedDataError: a document failed its checksum.
    Communication: collective over the data-parallel group.
    """
    settings = trainer.config.train
    batches: Iterator[TokenBatch] = iter(loader)
    skipped = 0
    if observer is not None and held_out is not None:
        observer.writer.note("evaluating the initial model")
    report(observer, 0, evaluate_now(trainer, held_out, 0, observer))
    for step in range(total_steps):
        started = time.perf_counter()
        trainer.timers.reset()
        with trainer.timers.phase("data"):
            batch = next(batches).to(trainer.groups.device)
        rate = learning_rate(
            step,
            peak=settings.lr,
            scheduler=settings.lr_scheduler,
            warmup_steps=settings.warmup_steps,
            total_steps=total_steps,
        )
        result = train_step(trainer, batch, step, rate)
        loader.commit()
        metrics = step_metrics(trainer, result, rate)
        metrics |= speed_metrics(trainer, time.perf_counter() - started, trainer.timers.seconds())

        skipped = 0 if result.update.applied else skipped + 1
        if skipped == MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteStepError(f"step {step}: {skipped} updates in a row had a gradient that is not finite")
        done = step + 1
        due = held_out is not None and held_out.interval is not None and done % held_out.interval == 0
        if due or done == total_steps:
            metrics |= evaluate_now(trainer, held_out, done, observer)
        report(observer, done, metrics)


def evaluate_now(trainer: Trainer, held_out: HeldOut | None, step: int, observer: Observer | None) -> dict[str, float]:
    """Held-out figures of the policy as it is.

    Communication: one gathering of all parameters and one of a few numbers per row.
    """
    if held_out is None:
        return {}
    with trainer.engine.whole_parameters() as policy:
        local = evaluate(policy, trainer.feature_network, held_out.rows, held_out.settings)
    evaluation = gather(local, trainer.groups.data_parallel)
    if observer is not None:
        observer.show_blocks(step, evaluation)
    return evaluation.means


def report(observer: Observer | None, step: int, metrics: dict[str, float]) -> None:
    """Write a step's metrics, if there are any and this rank is the one that writes."""
    if observer is not None and metrics:
        observer.writer.log(step, metrics)
