"""How long rows, steps and runs are for given data: the authors' figures, or less where there is less data."""

from dataclasses import dataclass

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.data.store.format import Manifest
from ebft_mega.errors import InputError, Problem

# The authors' run: rows of 1,024 tokens, 16 of them a step, 1,200 steps (arXiv 2603.12248).
ROW_LENGTHS = (1024, 512, 256, 128, 64, 32)
ROWS_PER_STEP = 16
MOST_STEPS = 1200
FEWEST_STEPS = 20  # with less data rows get shorter
HELD_OUT_ROWS = 64
FEWEST_HELD_OUT_ROWS = 8


@dataclass(frozen=True)
class DataSizes:
    """What is read of the data."""

    sequence_length: int  # tokens of a row
    rows: int  # of the training data, in one pass
    rows_per_step: int
    held_out_rows: int  # 0 without held-out data

    @property
    def steps_per_epoch(self) -> int:
        """Whole optimizer steps in one pass."""
        return self.rows // self.rows_per_step

    @property
    def steps(self) -> int:
        """Of the run: one pass, or as many as the authors' run had."""
        return max(1, min(MOST_STEPS, self.steps_per_epoch))

    @property
    def interval(self) -> int:
        """Optimizer steps between evaluations, and between checkpoints: a tenth of the run, but not every few steps."""
        return max(min(self.steps, 10), self.steps // 10)


def choose_sizes(architecture: Architecture, training: Manifest, held_out: Manifest | None, replicas: int) -> DataSizes:
    """Choose the longest rows with which the data suffices for a run.

    Args:
        architecture: of the model, whose positions bound a row.
        training, held_out: what the datasets hold.
        replicas: data-parallel size; the rows of a step are a multiple of it.

    Raises:
        InputError: there is not enough data even for the shortest rows, or the model reads no such rows.
    """
    limits = [architecture.max_position_embeddings, architecture.sliding_window]
    longest = min(limit for limit in limits if limit)
    lengths = [length for length in ROW_LENGTHS if length <= longest]
    if not lengths:
        expected = f"a model that reads rows of {ROW_LENGTHS[-1]} tokens"
        raise InputError([Problem("--model", "max_position_embeddings", str(longest), expected)])
    rows_per_step = -(-ROWS_PER_STEP // replicas) * replicas
    sizes = [_sizes(length, rows_per_step, training, held_out) for length in lengths]
    for size in sizes:
        enough = held_out is None or size.held_out_rows >= FEWEST_HELD_OUT_ROWS
        if enough and size.steps_per_epoch >= FEWEST_STEPS:
            return size
    shortest = sizes[-1]
    problems = []
    if shortest.steps_per_epoch < 1:
        found = f"{training.tokens:,}"
        expected = (
            f"at least {rows_per_step * shortest.sequence_length:,}: {rows_per_step} rows of a step, the shortest"
        )
        problems.append(Problem("--data", "tokens", found, expected))
    if held_out is not None and shortest.held_out_rows < 1:
        expected = f"at least one row of {shortest.sequence_length}, or no --held-out"
        problems.append(Problem("--held-out", "tokens", f"{held_out.tokens:,}", expected))
    if problems:
        raise InputError(problems)
    return shortest


def _sizes(length: int, rows_per_step: int, training: Manifest, held_out: Manifest | None) -> DataSizes:
    held_out_rows = 0 if held_out is None else min(HELD_OUT_ROWS, held_out.tokens // length)
    return DataSizes(length, training.tokens // length, rows_per_step, held_out_rows)
