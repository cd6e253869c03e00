"""Dump a step with NaN or infinite values to JSON, for the run that stops because of it."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebft_mega.io.durable import write_json
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.train.step import StepResult
from ebft_mega.types import TokenBatch

DUMP_DIRECTORY = "non_finite"


def dump_step(
    result: StepResult, step: int, first_row: int, rank: int, groups: ProcessGroups, output_dir: Path
) -> Path:
    """Write statistics of this rank's part of a step to `non_finite/step-XXXXXXXX-rank-XXXX.json`.

    Args:
        result: this rank's rows, rewards, log-probabilities, losses.
        step: number of the optimizer step, the first being 1, as in `metrics.jsonl`.
        first_row: number of the step's first row, counted through the whole run.
        rank, groups: this process in the job.
        output_dir: the run directory.
    Communication: none.
    """
    directory = output_dir / DUMP_DIRECTORY
    directory.mkdir(exist_ok=True)
    path = directory / f"step-{step:08d}-rank-{rank:04d}.json"
    content = {
        "step": step,
        "rank": rank,
        "data_parallel_rank": groups.data_parallel_rank,
        "tensor_parallel_rank": groups.tensor_parallel_rank,
        "pipeline_rank": groups.pipeline_rank,
        "grad_norm": _number(result.update.grad_norm),
        "micro_batches": [
            _describe_micro_batch(result, index, first_row) for index in range(len(result.micro_batches))
        ],
    }
    write_json(path, content)
    return path


def statistics(values: Tensor) -> dict[str, Any]:
    """Count, number of values that are not finite, and smallest, largest and mean of the others (None without any)."""
    values = values.detach().to(torch.float64)
    finite = values[values.isfinite()]
    summary: dict[str, Any] = {"count": values.numel(), "not_finite": values.numel() - finite.numel()}
    for name, reduce in (("min", torch.min), ("max", torch.max), ("mean", torch.mean)):
        summary[name] = reduce(finite).item() if finite.numel() else None
    return summary


def _describe_micro_batch(result: StepResult, index: int, first_row: int) -> dict[str, Any]:
    """Losses of a micro-batch and statistics of each of its rows; a stage of a pipeline knows only some of them."""
    per_row: dict[str, Tensor] = {}
    if result.experiences:
        experience = result.experiences[index]
        per_row["reward"] = experience.rewards.reward
        per_row |= {name: term.values for name, term in experience.rewards.terms.items()}
        per_row["advantage"] = experience.advantages
    losses: dict[str, Any] = {}
    if result.learned:
        learned = result.learned[index]
        losses = {name: _number(getattr(learned.terms, name).item()) for name in ("rl", "ce", "total")}
        if learned.logprobs.rollout is not None:
            per_row["logprobs"] = learned.logprobs.rollout
        if learned.logprobs.target is not None:
            per_row["target_logprobs"] = learned.logprobs.target
    counted = None
    if result.masks is not None:
        counted = result.masks.blocks[index].sum(dim=1).tolist()
    return {"loss": losses, "rows": _describe_rows(result.micro_batches[index], first_row, per_row, counted)}


def _describe_rows(
    rows: TokenBatch, first_row: int, per_row: dict[str, Tensor], counted_blocks: list[int] | None
) -> list[dict[str, Any]]:
    """Statistics of each row under its number in the run, as `data.skip_rows` takes it; filler has none."""
    described = []
    for position, index in enumerate(rows.row_indices.tolist()):
        numbers = {"row": first_row + index, "row_in_batch": index} if index >= 0 else {"row": None}
        documents = rows.document_ids[position].unique().tolist()
        row_statistics = {name: statistics(values[position]) for name, values in per_row.items()}
        weight = {} if counted_blocks is None else {"counted_blocks": counted_blocks[position]}
        described.append({**numbers, "documents": documents, **weight, **row_statistics})
    return described


def _number(value: float) -> float | str:
    """A JSON number, or `nan`, `inf`, `-inf` as text, which strict JSON has no numbers for."""
    return value if math.isfinite(value) else str(value)
