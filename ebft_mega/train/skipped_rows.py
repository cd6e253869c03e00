"""Rows that were left out because their data is damaged: written down, counted over all ranks, held to a budget."""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ebft_mega.data.loader import SkippedRow
from ebft_mega.errors import SkipBudgetError
from ebft_mega.parallel.groups import ProcessGroups

ERRORS_NAME = "data_errors.jsonl"

logger = logging.getLogger(__name__)


class SkippedRows:
    """The rows of a run that were left out so far, the same number on every rank.

    Args:
        allowed: how many there may be.
        output_dir: where `data_errors.jsonl` gets one line for each, written by the first rank.
        groups: rows differ between data-parallel ranks.
        before: rows that the run had left out before it was resumed.
    """

    def __init__(self, allowed: int, output_dir: Path, groups: ProcessGroups, before: int = 0):
        self._allowed, self._path, self._groups = allowed, output_dir / ERRORS_NAME, groups
        self.total = before

    def count(self, step: int, skipped: Sequence[SkippedRow], everywhere: int) -> None:
        """Add the rows of one step.

        Args:
            step: optimizer steps done, this one included.
            skipped: those of this rank.
            everywhere: how many they are over all data-parallel ranks, as every rank knows.
        Raises:
            SkipBudgetError: on all ranks, once there are more than allowed.
        Communication: none in a step without such rows; else over the data-parallel group one gathering of their
            descriptions and one barrier over all ranks, so that none ends before they are written.
        """
        if not everywhere:
            return
        parts: list[Any] = [None] * self._groups.data_parallel_size
        dist.all_gather_object(parts, [_described(step, row) for row in skipped], group=self._groups.data_parallel)
        records = [record for part in parts for record in part]
        self.total += everywhere
        if self._groups.is_first:
            _append(self._path, records)
            logger.warning("step %d: %d rows left out, %d so far: %s", step, everywhere, self.total, records)
        dist.barrier()
        if self.total > self._allowed:
            raise SkipBudgetError(
                f"step {step}: {self.total} rows were left out because their data is damaged, and "
                f"data.max_skipped_rows and data.max_skipped_share allow {self._allowed}; {self._path} lists them"
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
