"""One run, from its configuration to its final model: what happens once, before and after the training loop."""

import datetime
import hashlib
import logging
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from ebft_mega import errors
from ebft_mega.checkpoint.commit import CHECKPOINTS, newest
from ebft_mega.checkpoint.describing_files import describing_files, generation_config
from ebft_mega.checkpoint.run_state import STATE_NAME
from ebft_mega.checkpoint.saver import CheckpointSaver
from ebft_mega.config.load import resolved_yaml
from ebft_mega.config.schema import RunConfig
from ebft_mega.data.rows.loader import BatchLoader
from ebft_mega.io.output_directory import refuse_other_contents
from ebft_mega.lifecycle.build import build_chosen_trainer, held_out_rows, make_loader
from ebft_mega.lifecycle.model_identity import require_whole_models, run_identity
from ebft_mega.lifecycle.start import Start, find_start, tidy
from ebft_mega.model.weights.huggingface import CONFIG_NAME, hf_tensors, write_model
from ebft_mega.parallel.groups import ProcessGroups, connect, make_process_groups
from ebft_mega.planning.run_plan import RunPlan
from ebft_mega.runtime import run_files
from ebft_mega.runtime.agreement import from_first_rank, require_agreement
from ebft_mega.runtime.run_lock import RunLock
from ebft_mega.runtime.stop_requests import Signals, StopReason, StopRequests
from ebft_mega.runtime.watchdog import COLLECTIVE_MARGIN, Watchdog, leave_soon
from ebft_mega.train.hooks import Observer, open_observer, step_hooks
from ebft_mega.train.loop import rows_of_step, train
from ebft_mega.train.progress import Progress
from ebft_mega.train.step import Trainer
from ebft_mega.train.step_boundary import Boundary
from ebft_mega.train.step_trace import trace_step
from ebft_mega.types import DTYPES

logger = logging.getLogger(__name__)

MODEL_FOLDER = "hf"  # of a run directory: the final model


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

    @property
    def output(self) -> Path:
        """The run directory."""
        return self.config.output_dir

    @property
    def tokenizer_directory(self) -> Path:
        """The tokenizer of the training data; all sources have the same one."""
        return self.loader.stream.sources[0].dataset.tokenizer_directory


def run_training(
    config: RunConfig,
    plan: RunPlan,
    trace_directory: Path | None,
    signals: Signals,
    started_monotonic: float,
    write_report: Callable[[Path], Path],
) -> int:
    """Train, or trace one step.

    Args:
        plan: what `check_run` made of the configuration for this world size.
        trace_directory: write the trace of step 0 there and do nothing else.
        signals: those that this process gets.
        started_monotonic: `time.monotonic()` when the process started.
        write_report: writes the report page of a finished run directory and returns its path.
    Returns:
        Exit code of every rank: 0, or 75 if the run stopped on request.
    Communication: every rank of the job calls it.
    """
    groups = connect_ranks(config)
    loader = make_loader(config, groups, is_trace=trace_directory is not None)
    require_same_inputs(config, plan, loader)
    require_whole_models(config)
    if trace_directory is not None:
        return trace_first_step(config, plan, groups, loader, trace_directory)
    make_run_directory(config)
    with ExitStack() as held_to_the_end:
        lock = RunLock(config.output_dir)
        lock_notes = from_first_rank(lambda: held_to_the_end.enter_context(lock).notes)
        lock_lost = (lambda: lock.lost) if groups.is_world_first else (lambda: False)
        limit = config.train.max_run_minutes
        requests = StopRequests(signals, config.output_dir, started_monotonic, limit, groups.is_world_first)
        return run_in_directory(Run(config, plan, groups, loader, requests, lock_lost, write_report), lock_notes)


def connect_ranks(config: RunConfig) -> ProcessGroups:
    """Connect the ranks of the job and make its process groups.

    Raises:
        ConfigError: sequence parallelism without GPUs: megatron-core's mappings allocate on the current CUDA device.
    Communication: collective over the world.
    """
    timeout = timeout_of_steps(config) + COLLECTIVE_MARGIN
    device = connect(timeout)
    parallel, key = config.parallel, "parallel.sequence_parallel"
    if parallel.sequence_parallel and device.type != "cuda":
        found, expected = f"true, on a {device.type}", "false: it needs GPUs"
        raise errors.ConfigError([errors.Problem(config.place(key), key, found, expected)])
    return make_process_groups(device, parallel.tensor_parallel_size, parallel.pipeline_parallel_size, timeout)


def require_same_inputs(config: RunConfig, plan: RunPlan, loader: BatchLoader) -> None:
    """Check that all ranks have the same configuration and the same data.

    Raises:
        InputError: they have not.
    Communication: that of `require_agreement`.
    """
    held_out = plan.evaluation_rows
    require_agreement(
        {
            "configuration, sha256": hashlib.sha256(resolved_yaml(config).encode()).hexdigest(),
            config.data.mixture_key: loader.state.to_json(),
            "evaluation.shards": held_out.manifest.fingerprint if held_out else "none",
        }
    )


def timeout_of_steps(config: RunConfig) -> datetime.timedelta:
    """How long a run may take between two events that the watchdog is told of."""
    return datetime.timedelta(minutes=config.train.step_timeout_minutes)


def trace_first_step(
    config: RunConfig, plan: RunPlan, groups: ProcessGroups, loader: BatchLoader, directory: Path
) -> int:
    """Write the trace of optimizer step 0, without a run directory; returns the exit code.

    Communication: collective over the world.
    """
    watchdog = Watchdog(timeout_of_steps(config), log_path=None, record=lambda: errors.EXIT_HANG)
    with watchdog, closing(iter(loader)) as batches:
        trainer = build_chosen_trainer(config, plan, groups)
        trace_step(trainer, rows_of_step(next(batches).rows, config, groups.device), directory)
        dist.barrier()
    return errors.EXIT_DONE


def make_run_directory(config: RunConfig) -> None:
    """Make `output_dir`, before anything expensive.

    Raises:
        ConfigError: it cannot be made or written to, or something stands where the final model will be.
    """
    output = config.output_dir
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        found = f"{output}, which cannot be written ({error.strerror})"
        expected = "a writable directory, or one to be made"
        problem = errors.Problem(config.place("output_dir"), "output_dir", found, expected)
        raise errors.ConfigError([problem]) from None
    try:
        refuse_other_contents(output / MODEL_FOLDER, CONFIG_NAME, overwrite=True)
    except errors.InputError as error:
        problems = [problem.within(config.place("output_dir")) for problem in error.problems]
        raise errors.ConfigError(problems) from None


def run_in_directory(run: Run, notes: tuple[str, ...]) -> int:
    """Find the start, train, export, and record the outcome, whatever it is.

    Args:
        notes: for the person watching, from the start of the run so far.
    Returns:
        Exit code of every rank.
    Communication: collective over the world.
    """
    output = run.output
    log_path = run_files.setup_rank_log(output, dist.get_rank())
    notes += tuple(f"the file {name} of an earlier run was deleted" for name in run.requests.clear())
    if run.groups.is_world_first:
        (output / run_files.STATUS_NAME).unlink(missing_ok=True)  # the outcome of an earlier run there
    dist.barrier()  # from here on a status is one of this run
    progress = Progress()

    def record_hang() -> int:
        return record_failure(output, errors.EXIT_HANG, progress)

    try:
        with Watchdog(timeout_of_steps(run.config), log_path, record_hang) as watchdog:
            start = find_start(run.config, run.plan, run.loader)
            watchdog.beat("checking of the checkpoint")
            progress, start = start.progress, replace(start, notes=(*notes, *start.notes))
            stopped = train_and_export(run, start, watchdog)
            dist.barrier()
    except BaseException as error:
        leave_soon()
        logger.info("this rank failed", exc_info=True)  # below a warning, because it is on its way to standard error
        if isinstance(error, errors.LockLostError):
            raise  # the directory and the outcome in it are another run's
        # A rank whose peer failed loses its connection; the failure that the peer recorded is the cause.
        peer_code = run_files.failure_on_record(output)
        if peer_code is not None and not isinstance(error, errors.EbftError):
            raise errors.PeerFailedError(peer_code) from error
        code = error.exit_code if isinstance(error, errors.EbftError) else errors.EXIT_FAILED
        record_failure(output, code, progress)
        raise
    exit_code = errors.EXIT_STOPPED if stopped else errors.EXIT_DONE
    if run.groups.is_world_first:
        state: run_files.RunState = "stopped" if stopped else "done"
        run_files.write_status(output, state, exit_code, progress.step, newest_checkpoint(output))
    dist.barrier()
    return exit_code


def newest_checkpoint(output: Path) -> str | None:
    """Name of the newest checkpoint of a run directory, for its status; None if there is none or none can be listed."""
    try:
        return newest(output / CHECKPOINTS)
    except OSError:  # must not hide the outcome that it is recorded with
        return None


def record_failure(output: Path, exit_code: int, progress: Progress) -> int:
    """Record this rank's failure, unless another rank's is on record; returns the exit code on record."""
    try:
        return run_files.record_failure(output, exit_code, progress.step, newest_checkpoint(output))
    except OSError:  # the disk may be what has failed
        logger.exception("the outcome could not be recorded")
        return exit_code


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
    start = replace(start, notes=(*start.notes, *tidy(output / CHECKPOINTS, start)))
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
        stopped = train(trainer, run.loader, plan.total_steps, start.progress, hooks, watchdog)
        if stopped:
            if observer is not None:
                observer.writer.note(f"stopped after step {start.progress.step}: {stopped.words}")
            return stopped
        export(run, trainer)
        watchdog.beat("writing of the model")
    finally:
        if observer is not None:
            observer.writer.close()
    if groups.is_world_first:
        report = run.write_report(output)
        print(f"report: {report}\nmodel:  {output / MODEL_FOLDER}", flush=True)
    return StopReason.NONE


def export(run: Run, trainer: Trainer) -> None:
    """Write the final model as a Hugging Face directory.

    Communication: collective over the world, one parameter after another.
    """
    config, architecture = run.config, run.plan.architecture
    tensors = hf_tensors(trainer.engine.local_parameters(), trainer.stage)
    if not run.groups.is_world_first:
        for _ in tensors:  # gathering a parameter is collective
            pass
        return
    target, dtype = run.output / MODEL_FOLDER, DTYPES[config.train.dtype]
    write_model(target, architecture, tensors, dtype, run.tokenizer_directory, generation_config(config))


def _observer(run: Run, start: Start) -> Observer:
    """What the first rank writes for people, cut to where the run starts."""
    progress = start.progress
    facts = {"world_size": dist.get_world_size(), "threads": torch.get_num_threads()}
    (run.output / run_files.RESOLVED_CONFIG_NAME).write_text(resolved_yaml(run.config), encoding="utf-8")
    run_files.write_environment(run.output, facts)
    notes = (*run.plan.notes, *start.notes)
    return open_observer(
        run.output, run.tokenizer_directory, run.plan.total_steps, progress, start.is_in(run.output), notes
    )
