"""The training loop: optimizer steps, and what happens around each of them in a stated order (`hooks.py`)."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import closing

import torch
import torch.distributed as dist

from ebft_mega.config.entries import learning_rates
from ebft_mega.config.schema import RunConfig
from ebft_mega.cost.mfu import peak_flops
from ebft_mega.data.rows.loader import BatchLoader, LoadedBatch
from ebft_mega.data.rows.row_ranges import RowRanges
from ebft_mega.errors import EntryError, NonFiniteStepError, SkipBudgetError
from ebft_mega.extension.learning_rate_schedule import LearningRates
from ebft_mega.metrics.communication import Stopwatch, communication_stopwatch, timed_communication
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.planning.data_budget import allowed_skipped_rows
from ebft_mega.runtime.stop_requests import StopReason
from ebft_mega.runtime.watchdog import Watchdog
from ebft_mega.train.hooks import StepHooks
from ebft_mega.train.non_finite import DUMP_DIRECTORY, dump_step
from ebft_mega.train.progress import Progress
from ebft_mega.train.skipped_rows import account_for, read_alike
from ebft_mega.train.step import StepResult, train_step
from ebft_mega.train.step_metrics import distinct_shares_in, memory_metrics, speed_metrics, step_metrics
from ebft_mega.train.trainer import Trainer
from ebft_mega.types import TokenBatch

logger = logging.getLogger(__name__)

# A run in which no update was applied for so long will not recover by itself.
MAX_SKIPPED_IN_A_ROW = 10


def train(
    trainer: Trainer,
    loader: BatchLoader,
    total_steps: int,
    progress: Progress,
    hooks: StepHooks,
    watchdog: Watchdog,
) -> StopReason:
    """Run the optimizer steps that are left.

    Args:
        progress: where the run stands; moved on.
        hooks: what happens around every step, in their order: profile, evaluation, report, checkpoint.
    Returns:
        Why the run stopped before its end, with its state in a complete checkpoint; NONE: all steps are done.
    Raises:
        NonFiniteStepError: `MAX_SKIPPED_IN_A_ROW` updates in a row were skipped by all ranks.
        DamagedDataError: a document failed its checksum, and `data.on_error` is `raise`.
        SkipBudgetError: more rows were damaged than may be skipped.
        CheckpointError: a checkpoint could not be written, and the configuration or a stop request needs it.
        EntryError: an entry of the configuration does what its contract rules out.
    Communication: collective over all ranks.
    """
    stopwatch = communication_stopwatch(trainer.groups.device)
    if stopped := hooks.at_start(progress):
        return stopped
    with closing(iter(loader)) as own_batches, closing(hooks), timed_communication(stopwatch):
        batches = same_on_all_ranks(own_batches, loader, trainer.groups)
        rates = learning_rates(trainer.config, total_steps)
        while progress.step < total_steps:
            try:
                with hooks.around_step(progress.step):
                    loaded, result, metrics = measured_step(trainer, batches, progress.step, rates, stopwatch)
                progress.step += 1
                commit_step(progress, trainer, loader, loaded, result, metrics)
            except (EntryError, SkipBudgetError, NonFiniteStepError):
                hooks.finish()  # raised by all ranks: what is being written is not lost
                raise
            progress.pending = metrics | hooks.metrics() | data_metrics(loader)
            watchdog.beat(f"step {progress.step}")
            if stopped := hooks.after_step(progress):
                return stopped
            watchdog.beat(f"checkpoints after step {progress.step}")
    hooks.finish()
    watchdog.beat("the last checkpoint")
    return StopReason.NONE


def same_on_all_ranks(
    batches: Iterator[LoadedBatch], loader: BatchLoader, groups: ProcessGroups
) -> Iterator[LoadedBatch]:
    """The batches, with the same rows left out on all ranks of a replica where damaged rows may be skipped."""
    if not loader.skips_damaged_rows:
        return batches
    eos = loader.stream.sources[0].dataset.manifest.eos_id  # of all sources: a mixture that disagrees is refused
    return read_alike(batches, eos, groups)


def measured_step(
    trainer: Trainer, batches: Iterator[LoadedBatch], step: int, rates: LearningRates, stopwatch: Stopwatch
) -> tuple[LoadedBatch, StepResult, dict[str, float]]:
    """One optimizer step, and everything that is known about it.

    Args:
        batches: gives this rank's rows of the next global batch.
        step: number of the step, the first being 0.
        stopwatch: adds up this rank's communication; started anew here.
    Communication: collective over all ranks.
    """
    settings, device, timers = trainer.config.train, trainer.groups.device, trainer.timers
    started = time.perf_counter()
    stopwatch.reset()
    timers.reset()
    with timers.phase("data"):
        loaded = next(batches)
        batch = rows_of_step(loaded.rows, trainer.config, device)
    rate = rates.at(step)
    result = train_step(trainer, batch, step, rate)
    metrics = step_metrics(trainer, result, rate)
    metrics |= left_out_metrics(metrics, loaded.left_out, trainer.config)
    step_seconds = time.perf_counter() - started
    peak = peak_flops(torch.cuda.get_device_name(device), settings.dtype) if device.type == "cuda" else None
    shares = distinct_shares_in(metrics)
    metrics |= speed_metrics(trainer, step_seconds, timers.seconds(), stopwatch.seconds(), peak, shares)
    metrics |= seconds_over_ranks(step_seconds, device)
    if timers.memory is not None:
        metrics |= memory_metrics(timers.memory)
    return loaded, result, metrics


def count_skipped(progress: Progress, trainer: Trainer, result: StepResult, next_row: int) -> None:
    """Take in whether the step that has just been done was skipped.

    Args:
        next_row: first row of the run that no step has used yet.
    Raises:
        NonFiniteStepError: it is the `MAX_SKIPPED_IN_A_ROW`-th skipped one in a row. Every rank has then written what
            the step looked like. The message has the line that leaves the rows of those steps out.
    Communication: none, but for a barrier before the error, so that no rank ends while another one writes.
    """
    skipped, number = progress.skipped, progress.step
    skipped.count(result.update.applied)
    if result.update.applied:
        return
    logger.warning(
        "step %d: skipped by all ranks, because a loss, a reward or a gradient was not finite on one of them "
        "(%d in a row, %d in all)",
        number,
        skipped.in_a_row,
        skipped.total,
    )
    if skipped.in_a_row == MAX_SKIPPED_IN_A_ROW:
        config, output = trainer.config, trainer.config.output_dir
        first_row = next_row - config.train.global_batch_size
        try:
            path = dump_step(result, number, first_row, dist.get_rank(), trainer.groups, output)
            logger.error("wrote %s", path)
        except OSError as error:  # must not hide what it is about
            logger.error("rows and statistics could not be written: %s", error)
        dist.barrier()
        raise NonFiniteStepError(
            f"step {number}: {skipped.in_a_row} updates in a row had a loss, a reward or a gradient that is not "
            f"finite; rows and statistics are in {output / DUMP_DIRECTORY}. "
            f"A restart will meet the same rows. To leave them out: {way_past(config, skipped.in_a_row, next_row)}"
        )


def way_past(config: RunConfig, steps: int, next_row: int) -> str:
    """The option of a start that leaves out the rows of the last steps, beside those that are left out already.

    Args:
        next_row: first row of the run that no step has used yet.
    """
    first_row = max(0, next_row - steps * config.train.global_batch_size)
    rows = RowRanges(config.data.skip_rows).joined_with(first_row, next_row - 1)
    return f"--set 'data.skip_rows={rows}'"


def commit_step(
    progress: Progress,
    trainer: Trainer,
    loader: BatchLoader,
    loaded: LoadedBatch,
    result: StepResult,
    metrics: dict[str, float],
) -> None:
    """Count the step that has just been done, its rows, and what of it was left out, also in its metrics.

    Raises:
        SkipBudgetError: more rows were damaged than may be skipped.
        NonFiniteStepError: see `count_skipped`.
    Communication: if rows were left out, that of `account_for`.
    """
    config, left_out = trainer.config, int(metrics.get("data/skipped_rows", 0))
    loader.commit(left_out)
    if left_out:
        total, allowed = loader.state.skipped_rows, allowed_skipped_rows(config)
        account_for(progress.step, loaded.skipped, total, allowed, config.output_dir, trainer.groups)
    count_skipped(progress, trainer, result, loader.state.next_row)
    metrics["train/skipped_steps"] = float(progress.skipped.total)


def left_out_metrics(metrics: Mapping[str, float], left_out: int, config: RunConfig) -> dict[str, float]:
    """Tell the filler of `data.skip_rows` from that of damaged rows.

    Args:
        metrics: of the step, where `data/skipped_rows` counts both.
        left_out: rows of the global batch that `data.skip_rows` names.
    """
    if not config.data.skip_rows:
        return {}
    separate = {"data/left_out_rows": float(left_out)}
    if "data/skipped_rows" in metrics:
        separate["data/skipped_rows"] = metrics["data/skipped_rows"] - left_out
    return separate


def rows_of_step(rows: TokenBatch, config: RunConfig, device: torch.device) -> TokenBatch:
    """Rows as a step takes them: on its device, and with document masking if the configuration says so."""
    return (rows.with_document_masking() if config.data.document_masking else rows).to(device)


def data_metrics(loader: BatchLoader) -> dict[str, float]:
    """How far the committed steps have come in the data: rows, tokens and epochs, by source where there are several.

    Rows that were left out count as read. Communication: none.
    """
    state, sources = loader.state, loader.stream.sources
    metrics = {"data/rows": float(state.next_row), "data/tokens": float(state.next_row * state.sequence_length)}
    for source, part in zip(sources, state.sources, strict=True):
        tokens = float(part.rows * state.sequence_length)
        name = f"/{source.name}" if len(sources) > 1 else ""
        metrics[f"data/tokens{name}"] = tokens
        metrics[f"data/epochs{name}"] = tokens / source.dataset.manifest.tokens
    if loader.skips_damaged_rows:
        metrics["data/skipped_rows_total"] = float(state.skipped_rows)
    return metrics


def seconds_over_ranks(step_seconds: float, device: torch.device) -> dict[str, float]:
    """The shortest and the longest time of a step on any rank, in seconds: a straggler is a wide gap.

    Communication: one all-reduce of two float64 over all ranks.
    """
    extremes = torch.tensor([-step_seconds, step_seconds], dtype=torch.float64, device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    negative_shortest, longest = extremes.tolist()
    return {"perf/step_seconds_min": -negative_shortest, "perf/step_seconds_max": longest}
