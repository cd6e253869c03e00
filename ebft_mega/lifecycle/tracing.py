"""Trace one optimizer step, after a warm-up of estimators if one is asked for, without a run directory."""

import datetime
from contextlib import closing
from dataclasses import replace

import torch.distributed as dist

from ebft_mega.config.schema import RunConfig
from ebft_mega.data.rows.loader import BatchLoader
from ebft_mega.errors import EXIT_DONE, EXIT_HANG
from ebft_mega.lifecycle.build import build_chosen_trainer
from ebft_mega.lifecycle.inputs import text_decoder
from ebft_mega.lifecycle.run_directory import make_writable_directory
from ebft_mega.metrics.announcer import Announcer
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.planning.run_plan import RunPlan
from ebft_mega.planning.short_plan import TraceRequest
from ebft_mega.runtime.agreement import from_first_rank
from ebft_mega.runtime.watchdog import Watchdog
from ebft_mega.train.loop import rows_of_step
from ebft_mega.train.step import observe_step
from ebft_mega.train.step_trace import trace_step


def trace_one_step(
    config: RunConfig,
    plan: RunPlan,
    groups: ProcessGroups,
    loader: BatchLoader,
    request: TraceRequest,
    announcer: Announcer,
) -> int:
    """Write the trace of the first optimizer step, or of one after a warm-up, without a run directory.

    In the warm-up weights stay as they are: what a step's estimator learns of its batch it learns there, too.

    Args:
        request: where the trace goes, and which step it is of.
        announcer: says what is done and how far it has come.
    Returns:
        The exit code.
    Raises:
        ConfigError: the directory cannot be written to; before the step.
    Communication: collective over the world.
    """
    from_first_rank(lambda: make_writable_directory(request.directory, "--trace-step", "DIR"))
    watchdog = Watchdog(timeout_of_steps(config), log_path=None, record=lambda: EXIT_HANG)
    with watchdog, closing(iter(loader)) as batches:
        decode = text_decoder(config, loader)
        trainer = replace(build_chosen_trainer(config, plan, groups, announcer=announcer), decode=decode)
        if request.warmup:
            with announcer.phase("letting estimators learn", request.warmup, "batches") as count:
                for step in range(request.warmup):
                    observe_step(trainer, rows_of_step(next(batches).rows, config, groups.device), step)
                    watchdog.beat(f"batch {step} of the warm-up")
                    count(1)
        with announcer.phase(f"one optimizer step, traced into {request.directory}"):
            rows = rows_of_step(next(batches).rows, config, groups.device)
            trace_step(trainer, rows, request.directory, request.warmup, request.noise)
        dist.barrier()
    return EXIT_DONE


def timeout_of_steps(config: RunConfig) -> datetime.timedelta:
    """How long a run may take between two events that the watchdog is told of."""
    return datetime.timedelta(minutes=config.train.step_timeout_minutes)
