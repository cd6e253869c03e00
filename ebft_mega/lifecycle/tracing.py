"""Trace one optimizer step, without a run directory."""

import datetime
from contextlib import closing
from dataclasses import replace
from pathlib import Path

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
from ebft_mega.runtime.agreement import from_first_rank
from ebft_mega.runtime.watchdog import Watchdog
from ebft_mega.train.loop import rows_of_step
from ebft_mega.train.step_trace import trace_step


def trace_first_step(
    config: RunConfig,
    plan: RunPlan,
    groups: ProcessGroups,
    loader: BatchLoader,
    directory: Path,
    announcer: Announcer,
) -> int:
    """Write the trace of optimizer step 0, without a run directory; returns the exit code.

    Args:
        directory: takes the trace.
        announcer: says what is done and how far it has come.
    Raises:
        ConfigError: the directory cannot be written to; before the step.
    Communication: collective over the world.
    """
    from_first_rank(lambda: make_writable_directory(directory, "--trace-step", "DIR"))
    watchdog = Watchdog(timeout_of_steps(config), log_path=None, record=lambda: EXIT_HANG)
    with watchdog, closing(iter(loader)) as batches:
        decode = text_decoder(config, loader)
        trainer = replace(build_chosen_trainer(config, plan, groups, announcer=announcer), decode=decode)
        with announcer.phase(f"one optimizer step, traced into {directory}"):
            trace_step(trainer, rows_of_step(next(batches).rows, config, groups.device), directory)
        dist.barrier()
    return EXIT_DONE


def timeout_of_steps(config: RunConfig) -> datetime.timedelta:
    """How long a run may take between two events that the watchdog is told of."""
    return datetime.timedelta(minutes=config.train.step_timeout_minutes)
