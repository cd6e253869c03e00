"""One run: connect the ranks, check what they share, lock the run directory, run, and record the outcome."""

import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from ebft_mega.config.schema import RunConfig
from ebft_mega.errors import OutOfMemoryError
from ebft_mega.features.pool_check import check_pooling
from ebft_mega.lifecycle import connecting
from ebft_mega.lifecycle.build import memory_needs
from ebft_mega.lifecycle.inputs import make_loader
from ebft_mega.lifecycle.model_identity import require_whole_models
from ebft_mega.lifecycle.outcome import Outcome
from ebft_mega.lifecycle.run_directory import make_run_directory
from ebft_mega.lifecycle.setting_aside import Fresh, take_directory
from ebft_mega.lifecycle.standing import Action, Standing, conclude
from ebft_mega.lifecycle.start import find_start
from ebft_mega.lifecycle.tracing import timeout_of_steps, trace_one_step
from ebft_mega.lifecycle.training import Run, train_and_export
from ebft_mega.metrics.announcer import Announcer
from ebft_mega.planning.run_plan import RunPlan
from ebft_mega.planning.short_plan import TraceRequest
from ebft_mega.runtime.agreement import from_first_rank
from ebft_mega.runtime.repeatability import use_deterministic_kernels
from ebft_mega.runtime.run_files import STATUS_NAME, setup_rank_log
from ebft_mega.runtime.run_lock import RunLock
from ebft_mega.runtime.stop_requests import Signals, StopRequests
from ebft_mega.runtime.watchdog import Watchdog, leave_soon
from ebft_mega.runtime.witness import Witness, watched_by

logger = logging.getLogger(__name__)


def run_training(
    config: RunConfig,
    plan: RunPlan,
    trace: TraceRequest | None,
    signals: Signals,
    started_monotonic: float,
    write_report: Callable[[Path], Path],
    fresh: Fresh | None = None,
    announcer: Announcer | None = None,
) -> int:
    """Train, or trace one step.

    Args:
        plan: what `check_run` made of the configuration for this world size.
        trace: write that and do nothing else; None: train.
        signals: those that this process gets.
        started_monotonic: `time.monotonic()` when the process started.
        write_report: writes the report page of a finished run directory and returns its path.
        fresh: whether what is in the run directory is set aside first; None: it is not.
        announcer: says what is done until the first step and after the last one; None: nobody does.
    Returns:
        Exit code of every rank: 0, or 75 if the run stopped on request.
    Communication: every rank of the job calls it.
    """
    announcer = announcer or Announcer()
    check_pooling(config)
    if config.deterministic:
        use_deterministic_kernels(os.environ)
    with signals.stopped_with_peers():
        with announcer.phase(connecting.connecting_words(config, plan)):
            groups = connecting.connect_ranks(config)
        with announcer.phase("opening the datasets, and comparing them and the configuration over all ranks"):
            loader = make_loader(config, groups, is_trace=trace is not None)
            connecting.require_same_inputs(config, plan, loader)
        require_whole_models(config, announcer)
    if trace is not None:
        return trace_one_step(config, plan, groups, loader, trace, announcer)
    with ExitStack() as held_to_the_end:
        with announcer.phase(f"taking the run directory {config.output_dir}, and looking at what is in it"):
            make_run_directory(config)
            lock = RunLock(config.output_dir)
            lock_notes = from_first_rank(lambda: held_to_the_end.enter_context(lock).notes)
            limit = config.train.max_run_minutes
            if groups.is_world_first:
                signals.before_forced_end(lock.delete)
            requests = StopRequests(signals, config.output_dir, started_monotonic, limit, groups.is_world_first)
            # By one rank, under the lock: nobody else changes what is found.
            standing = from_first_rank(lambda: take_directory(config, plan, fresh or Fresh()), Standing)
        if standing.action is Action.NOTHING:
            return from_first_rank(lambda: conclude(config, standing, write_report))
        run = Run(config, plan, groups, loader, signals, requests, lambda: lock.lost, write_report, standing, announcer)
        return run_in_directory(run, (*lock_notes, *standing.notes))


def run_in_directory(run: Run, notes: tuple[str, ...]) -> int:
    """Find the start, train, export, and record the outcome, whatever it is.

    Args:
        notes: for the person watching, from the start of the run so far.
    Returns:
        Exit code of every rank.
    Communication: collective over the world.
    """
    output = run.output
    log_path = setup_rank_log(output, dist.get_rank())
    notes += tuple(f"the file {name} of an earlier run was deleted" for name in run.requests.clear())
    if run.groups.is_world_first:
        (output / STATUS_NAME).unlink(missing_ok=True)  # the outcome of an earlier run there
    dist.barrier()  # from here on a status is one of this run
    outcome = Outcome(output, run.lost)
    run.signals.before_forced_end(outcome.of_stop_at_start)
    needs = memory_needs(run.config, run.plan, run.groups)
    witness = Witness(dist.get_rank(), log_path, output / STATUS_NAME, needs)
    run.signals.before_forced_end(witness.leave)
    run.signals.before_end_at_once(witness.leave)

    def of_hang() -> int:
        witness.leave()
        return outcome.of_hang()

    try:
        with watched_by(witness), Watchdog(timeout_of_steps(run.config), log_path, of_hang) as watchdog:
            start = find_start(run.config, run.plan, run.loader, run.announcer)
            watchdog.beat("checking of the checkpoint")
            outcome.begin(start.progress)
            stopped = train_and_export(run, replace(start, notes=(*notes, *start.notes)), watchdog)
            from_first_rank(lambda: outcome.require_results(bool(stopped)))
    except BaseException as error:
        run.signals.fail_undisturbed()
        leave_soon()
        cause = outcome.of_error(error)
        if cause is error and (words := witness.words_for(error)):
            cause = OutOfMemoryError(words)
        if cause is not error:
            raise cause from error
        raise
    exit_code = outcome.of_end(bool(stopped), is_writer=run.groups.is_world_first)
    dist.barrier()
    return exit_code
