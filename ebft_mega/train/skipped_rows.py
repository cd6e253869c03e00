"""Rows left out because their data is damaged: the same on all ranks of a replica, written down, within a budget."""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ebft_mega.data.rows.loader import LoadedBatch, SkippedRow
from ebft_mega.errors import SkipBudgetError
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.runtime.exchange import all_gather_values
from ebft_mega.runtime.run_files import DATA_ERRORS_NAME

logger = logging.getLogger(__name__)


def read_alike(batches: Iterator[LoadedBatch], filler_token: int, groups: ProcessGroups) -> Iterator[LoadedBatch]:
    """The same batches, with filler in the place of every row that any rank of the replica could not read.

    Each rank reads by itself, and what is damaged for one may be whole for another: a local copy, a server that failed
    once. All ranks of a replica have to work on the same rows.

    Args:
        filler_token: the end-of-document token, as in the loader's own filler.
    Communication: with several ranks in a replica, for each batch one all-reduce of B int64 over them.
    """
    for loaded in batches:
        rows = loaded.rows
        indices = rows.row_indices.to(groups.device)
        if dist.get_world_size(groups.model_parallel) > 1:
            dist.all_reduce(indices, op=dist.ReduceOp.MIN, group=groups.model_parallel)
        row_indices = indices.to(rows.row_indices.device)
        unread = (row_indices < 0)[:, None]
        alike = replace(
            rows,
            tokens=rows.tokens.masked_fill(unread, filler_token),
            document_ids=rows.document_ids.masked_fill(unread, 0),
            row_indices=row_indices,
        )
        yield replace(loaded, rows=alike)


def account_for(
    step: int, skipped: Sequence[SkippedRow], total: int, allowed: int, output_dir: Path, groups: ProcessGroups
) -> None:
    """Write down the rows that a step left out, and end the run if there have been too many.

    All ranks call it after a step in which any of them left a row out.

    Args:
        step: optimizer steps done, this one included.
        skipped: the rows that this rank could not read.
        total: rows that the run has left out so far, over all ranks, this step's included.
        allowed: how many there may be.
        output_dir: where `data_errors.jsonl` gets one line for each row, written by the first rank.
    Raises:
        SkipBudgetError: on all ranks, if there are more than allowed.
    Communication: over the world one gathering of descriptions, and one barrier so that no rank ends before they are
        written.
    """
    parts = all_gather_values([_described(step, row) for row in skipped])
    # Most often all ranks of a replica tell of the same damage; any of them may be the only one.
    by_row = {record["row"]: record for part in reversed(parts) for record in part}
    records = [by_row[row] for row in sorted(by_row)]
    path = output_dir / DATA_ERRORS_NAME
    if groups.is_world_first:
        try:
            _append(path, records)
        except OSError as error:  # the same is in the log
            logger.warning("%s cannot be written (%s); training continues", path, error)
        logger.warning("step %d: %d rows left out, %d so far: %s", step, len(records), total, records)
    dist.barrier()
    if total > allowed:
        raise SkipBudgetError(
            f"step {step}: {total} rows were left out because their data is damaged, and "
            f"data.max_skipped_rows and data.max_skipped_share allow {allowed}; {path} lists them"
        )


def _described(step: int, row: SkippedRow) -> dict[str, Any]:
    damage = row.damage
    return {
        "step": step,
        "row": row.number,
        "row_in_batch": row.index,
        "shard": damage.shard,
        "offset": damage.offset,
        "document": damage.document,
        "expected": damage.expected,
        "found": damage.found,
    }


def _append(path: Path, records: Sequence[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())
