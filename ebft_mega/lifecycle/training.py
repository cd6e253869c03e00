"""From a start to the final model: build the trainer, take the steps that are left, write the model and the report."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist

from ebft_mega.checkpoint.commit import CHECKPOINTS
from ebft_mega.checkpoint.describing_files import DescribingFiles, checkpoint_files
from ebft_mega.checkpoint.run_state import STATE_NAME
from ebft_mega.checkpoint.saver import CheckpointSaver
from ebft_mega.config.schema import RunConfig
from ebft_mega.data.rows.loader import BatchLoader
from ebft_mega.errors import CheckpointError
from ebft_mega.lifecycle import inputs
from ebft_mega.lifecycle.build import build_chosen_trainer
from ebft_mega.lifecycle.model_identity import run_identity
from ebft_mega.lifecycle.results import export, open_results, read_described, show_results
from ebft_mega.lifecycle.standing import Standing
from ebft_mega.lifecycle.start import Start, tidy
from ebft_mega.metrics.announcer import Announcer
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.planning.run_plan import RunPlan
from ebft_mega.runtime.agreement import from_first_rank
from ebft_mega.runtime.run_lock import Loss
from ebft_mega.runtime.stop_requests import Signals, StopReason, StopRequests
from ebft_mega.runtime.watchdog import Watchdog
from ebft_mega.train.hooks import StepHooks, step_hooks
from ebft_mega.train.loop import train
from ebft_mega.train.observer import Observer, announcer_of
from ebft_mega.train.progress import Progress
from ebft_mega.train.step_boundary import Boundary
from ebft_mega.train.trainer import Trainer


@dataclass(frozen=True)
class Run:
    """A run in a directory that it has locked, and what it is made with."""

    config: RunConfig
    plan: RunPlan
    groups: ProcessGroups
    loader: BatchLoader
    signals: Signals
    requests: StopRequests
    lost: Callable[[], Loss]  # what has become of the run directory, as far as this rank knows
    write_report: Callable[[Path], Path]  # makes the page of a finished run directory, and returns its path
    standing: Standing  # what was found in the directory
    announcer: Announcer  # says what is done before the first step and after the last one

    @property
    def output(self) -> Path:
        """The run directory."""
        return self.config.output_dir

    @property
    def tokenizer_directory(self) -> Path:
        """The tokenizer of the training data; all sources have the same one."""
        return self.loader.stream.sources[0].dataset.tokenizer_directory


def train_and_export(run: Run, start: Start, watchdog: Watchdog) -> StopReason:
    """Build the trainer, take the steps that are left, and write the final model and the report.

    Returns:
        Why the run stopped before its end; NONE: it is done.
    Communication: collective over the world.
    """
    config, plan, groups, output = run.config, run.plan, run.groups, run.output
    identity = run_identity(config, plan, start.saved, start.started_from, run.announcer)
    watchdog.beat("hashing of the initial model")
    decode = inputs.text_decoder(config, run.loader)
    trainer = build_chosen_trainer(config, plan, groups, start.saved_state, run.announcer)
    trainer = replace(trainer, decode=decode)
    watchdog.beat("building of the model")
    with run.announcer.phase(f"reading {config.evaluation.rows} held-out rows, and the tokenizer"):
        held_out = inputs.held_out_rows(config, groups)
        described = read_described(config, run.tokenizer_directory)
    for_checkpoints = checkpoint_files(config, plan.architecture, described) if described is not None else {}

    def small_files(progress: Progress) -> dict[str, bytes]:
        state = identity.state(progress, run.loader, trainer.engine.applied_updates)
        state = state.model_copy(update={"critic": trainer.critic_record})
        return {**for_checkpoints, STATE_NAME: state.to_json().encode()}

    # Nothing refuses the start from here on; until now everything in the run directory was left as it was.
    going_back = run.standing.notes_on_going_back(start.progress.step) if start.is_in(output) else ()
    start = replace(start, notes=(*start.notes, *going_back, *tidy(output / CHECKPOINTS, start)))
    observer = _observer(run, start, described) if described is not None else None
    try:
        boundary = Boundary(
            trainer,
            CheckpointSaver(output / CHECKPOINTS, groups, config.checkpoint.keep_last, config.checkpoint.keep_every),
            run.requests,
            run.lost,
            small_files,
            announcer=announcer_of(observer),
            beat=watchdog.beat,
            begun=start.progress,
            saved=start.progress if start.is_in(output) else None,
        )
        hooks = step_hooks(trainer, held_out, plan.total_steps, boundary, observer, watchdog)
        with announcer_of(observer).phase("waiting until all ranks are as far"):
            dist.barrier()  # a rank that stops until here has trained nothing, and neither have the others
        run.signals.train_from_now_on()
        stopped, failure = _take_steps(run, trainer, start.progress, hooks, watchdog)
        if stopped:
            if observer is not None:
                observer.writer.note(f"stopped after step {start.progress.step}: {stopped.words}")
            return stopped
        export(config, plan, start, trainer, described, announcer_of(observer).of_part("end"))
        watchdog.beat("writing of the model")
    finally:
        if observer is not None:
            observer.writer.close()
    if observer is not None:
        show_results(output, run.write_report, run.announcer.of_part("end"))
    from_first_rank(observer.writer.require_whole if observer is not None else lambda: None)
    if failure is not None:
        raise failure
    return StopReason.NONE


def _take_steps(
    run: Run, trainer: Trainer, progress: Progress, hooks: StepHooks, watchdog: Watchdog
) -> tuple[StopReason, CheckpointError | None]:
    """Take the steps that are left; a checkpoint that fails when all are done is returned, on all ranks alike.

    The model is no worse for that, and is written before the run fails.
    """
    total_steps = run.plan.total_steps
    try:
        return train(trainer, run.loader, total_steps, progress, hooks, watchdog), None
    except CheckpointError as error:
        if progress.step < total_steps or progress.evaluation_pending:
            raise
        return StopReason.NONE, error


def _observer(run: Run, start: Start, described: DescribingFiles) -> Observer:
    """What the first rank writes for people, cut to where the run starts."""
    left = run.plan.total_steps - start.progress.step
    total_rows = run.loader.state.next_row + left * run.config.train.global_batch_size
    dataset, model_step = run.loader.stream.sources[0].dataset, run.standing.model_step
    return open_results(run.config, run.plan, start, described, dataset, model_step, total_rows, run.announcer)
