"""From a start to the final model: build the trainer, take the steps that are left, write the model and the report."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ebft_mega.checkpoint.commit import CHECKPOINTS
from ebft_mega.checkpoint.describing_files import describing_files
from ebft_mega.checkpoint.run_state import STATE_NAME
from ebft_mega.checkpoint.saver import CheckpointSaver
from ebft_mega.config.schema import RunConfig
from ebft_mega.data.rows.loader import BatchLoader
from ebft_mega.errors import CheckpointError
from ebft_mega.lifecycle.build import build_chosen_trainer
from ebft_mega.lifecycle.inputs import held_out_rows
from ebft_mega.lifecycle.model_identity import run_identity
from ebft_mega.lifecycle.results import describe_in_directory, export
from ebft_mega.lifecycle.standing import Standing
from ebft_mega.lifecycle.start import Start, tidy
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.planning.dry_run import checkpoint_words
from ebft_mega.planning.run_plan import RunPlan
from ebft_mega.runtime.run_files import MODEL_FOLDER
from ebft_mega.runtime.stop_requests import StopReason, StopRequests
from ebft_mega.runtime.watchdog import Watchdog
from ebft_mega.train.hooks import Observer, open_observer, step_hooks
from ebft_mega.train.loop import train
from ebft_mega.train.progress import Progress
from ebft_mega.train.step_boundary import Boundary


@dataclass(frozen=True)
class Run:
    """A run in a directory that it has locked, and what it is made with."""

    config: RunConfig
    plan: RunPlan
    groups: ProcessGroups
    loader: BatchLoader
    requests: StopRequests
    lock_lost: Callable[[], bool]  # whether this rank knows that another run has the directory now
    write_report: Callable[[Path], Path]  # makes the page of a finished run directory, and returns its path
    standing: Standing  # what was found in the directory

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
    identity = run_identity(config, plan, start.saved, start.started_from)
    watchdog.beat("hashing of the initial model")
    trainer = build_chosen_trainer(config, plan, groups, start.saved_state)
    watchdog.beat("building of the model")
    held_out = held_out_rows(config, groups)
    described = describing_files(config, plan.architecture, run.tokenizer_directory) if groups.is_world_first else {}

    def small_files(progress: Progress) -> dict[str, bytes]:
        state = identity.state(progress, run.loader, trainer.engine.applied_updates)
        return {**described, STATE_NAME: state.to_json().encode()}

    # Nothing refuses the start from here on; until now everything in the run directory was left as it was.
    going_back = run.standing.notes_on_going_back(start.progress.step) if start.is_in(output) else ()
    start = replace(start, notes=(*start.notes, *going_back, *tidy(output / CHECKPOINTS, start)))
    observer = _observer(run, start) if groups.is_world_first else None
    try:
        boundary = Boundary(
            trainer,
            CheckpointSaver(output / CHECKPOINTS, groups, config.checkpoint.keep_last, config.checkpoint.keep_every),
            run.requests,
            run.lock_lost,
            small_files,
            announce=observer.writer.note if observer is not None else None,
            beat=watchdog.beat,
            saved=start.progress if start.is_in(output) else None,
        )
        hooks = step_hooks(trainer, held_out, plan.total_steps, boundary, observer, watchdog)
        stopped, failure = StopReason.NONE, None
        try:
            stopped = train(trainer, run.loader, plan.total_steps, start.progress, hooks, watchdog)
        except CheckpointError as error:
            if start.progress.step < plan.total_steps or start.progress.evaluation_pending:
                raise
            failure = error  # of the last checkpoint, on all ranks: the model is no worse for it
        if stopped:
            if observer is not None:
                observer.writer.note(f"stopped after step {start.progress.step}: {stopped.words}")
            return stopped
        export(config, plan, start, trainer, run.tokenizer_directory)
        watchdog.beat("writing of the model")
    finally:
        if observer is not None:
            observer.writer.close()
    if groups.is_world_first:
        report = run.write_report(output)
        print(f"report: {report}\nmodel:  {output / MODEL_FOLDER}", flush=True)
    if failure is not None:
        raise failure
    return StopReason.NONE


def _observer(run: Run, start: Start) -> Observer:
    """What the first rank writes for people, cut to where the run starts."""
    describe_in_directory(run.config, run.plan, start, run.standing.model_step)
    notes = (*run.plan.notes, *start.notes, checkpoint_words(run.config, run.plan.architecture))
    total_steps, resumes_here = run.plan.total_steps, start.is_in(run.output)
    return open_observer(run.output, run.tokenizer_directory, total_steps, start.progress, resumes_here, notes)
