"""What a run writes beside metrics and checkpoints: what it is, and at the end its model and the report."""

import logging
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch.distributed as dist

from ebft_mega.architecture.tensor_shapes import hf_shapes
from ebft_mega.checkpoint.describing_files import DescribingFiles, describing_files
from ebft_mega.config.load import resolved_yaml
from ebft_mega.config.schema import RunConfig
from ebft_mega.data.store.dataset import Dataset
from ebft_mega.io.durable import write_bytes
from ebft_mega.io.standard_streams import print_line
from ebft_mega.lifecycle.run_directory import clear_unfinished
from ebft_mega.lifecycle.run_record import RECORD_NAME, RunRecord
from ebft_mega.lifecycle.start import Start
from ebft_mega.metrics.announcer import Announcer, counted
from ebft_mega.model.weights.model_directory import write_model
from ebft_mega.model.weights.stage_weights import hf_tensors
from ebft_mega.planning.run_plan import RunPlan
from ebft_mega.planning.short_plan import plan_facts
from ebft_mega.runtime.agreement import from_first_rank
from ebft_mega.runtime.repeatability import describe_numerics
from ebft_mega.runtime.run_files import MODEL_FOLDER, REPORT_NAME, RESOLVED_CONFIG_NAME, write_environment
from ebft_mega.train.observer import Observer, open_observer
from ebft_mega.train.trainer import Trainer
from ebft_mega.types import DTYPES

logger = logging.getLogger(__name__)


def read_described(config: RunConfig, tokenizer_directory: Path) -> DescribingFiles | None:
    """Read what describes the model beside its weights, on the first rank; None on the others.

    Args:
        tokenizer_directory: of the training data.
    Raises:
        BrokenCheckpointError: on every rank, if the run starts from a checkpoint with a changed file.
    Communication: one broadcast over the world.
    """
    found: list[DescribingFiles] = []
    from_first_rank(lambda: found.append(describing_files(config, tokenizer_directory)))
    return found[0] if found else None


def open_results(
    config: RunConfig,
    plan: RunPlan,
    start: Start,
    described: DescribingFiles,
    dataset: Dataset,
    model_step: int | None,
    total_rows: int,
    announcer: Announcer,
) -> Observer:
    """Describe the run in its directory, and open what a person reads, cut to where the run starts. On the first rank.

    Args:
        described: what describes the model beside its weights.
        dataset: a source of the training data; all have the same tokenizer.
        model_step: optimizer steps of the final model that lies there; None: there is none.
        total_rows: that the whole run reads.
        announcer: says that it is opened.
    """
    output, resumes_here = config.output_dir, start.is_in(config.output_dir)
    with announcer.phase(f"opening metrics and tensorboard in {output}"):
        describe_in_directory(config, plan, start, model_step)
        notes = (*plan.notes, *start.notes, *described.notes)
        return open_observer(output, dataset, plan.total_steps, start.progress, resumes_here, notes, total_rows)


def describe_in_directory(config: RunConfig, plan: RunPlan, start: Start, model_step: int | None) -> None:
    """Write what the run is and runs on, in place of what unfinished starts have left. On the first rank.

    Args:
        model_step: optimizer steps of the final model that lies there; None: there is none.
    """
    output = config.output_dir
    clear_unfinished(output, is_all=not start.is_in(output))
    record = RunRecord.of(config, plan, start.started_from).model_copy(update={"model_step": model_step})
    write_bytes(output / RECORD_NAME, record.to_json().encode())
    facts = {
        "world_size": dist.get_world_size(),
        **describe_numerics(),
        "started": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        "run": plan_facts(config, plan),  # for the head of the page
    }
    write_bytes(output / RESOLVED_CONFIG_NAME, resolved_yaml(config).encode())
    write_environment(output, facts, config.loaded_plugins)


def export(
    config: RunConfig,
    plan: RunPlan,
    start: Start,
    trainer: Trainer,
    described: DescribingFiles | None,
    announcer: Announcer,
) -> None:
    """Write the final model as a Hugging Face directory, with the record of the run and its steps.

    Args:
        described: what describes the model beside its weights; None on all ranks but the first.
        announcer: says how far it has come.
    Communication: collective over the world, one parameter after another.
    """
    tensors = hf_tensors(trainer.engine.local_parameters(), trainer.stage)
    if described is None:
        for _ in tensors:  # gathering a parameter is collective
            pass
        return
    record = RunRecord.of(config, plan, start.started_from).model_copy(update={"step": plan.total_steps})
    files = {**described.contents, RECORD_NAME: record.to_json().encode()}
    target, dtype = config.output_dir / MODEL_FOLDER, DTYPES[config.train.dtype]
    total, size_bytes = len(hf_shapes(plan.architecture)), plan.architecture.num_parameters * dtype.itemsize
    words = f"writing the final model to {target}, {total} tensors, {size_bytes / 1e9:.3f} GB"
    with announcer.phase(words, total, "tensors") as count:
        write_model(target, plan.architecture, counted(tensors, count), dtype, files)


def show_results(output: Path, write_report: Callable[[Path], Path], announcer: Announcer) -> None:
    """Make the report, and say where it and the model are; a report that cannot be made is a warning.

    Args:
        output: a run directory with its model and metrics.
        write_report: makes the page and returns its path.
        announcer: says that it is made.
    """
    try:
        with announcer.phase(f"drawing {REPORT_NAME}"):
            page = write_report(output)
        print_line(f"report: {page}", sys.stdout)
    except Exception as error:  # of any kind: the model and the metrics are there
        logger.warning("%s could not be written: %s: %s", REPORT_NAME, type(error).__name__, error)
    print_line(f"model:  {output / MODEL_FOLDER}", sys.stdout)
