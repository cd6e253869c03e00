"""What ranks must know of each other's data: that it is the same, and how many rows were left out."""

import json
from pathlib import Path

import torch.distributed as dist

from ebft_mega.data.loader import SkippedRow
from ebft_mega.errors import DamagedDataError, InputError, SkipBudgetError
from ebft_mega.parallel.groups import connect, make_process_groups
from ebft_mega.train.agreement import require_agreement
from ebft_mega.train.skipped_rows import ERRORS_NAME, SkippedRows
from tests.distributed.ranks import run_ranks


def compare(values):
    connect()
    try:
        require_agreement({"data": values[dist.get_rank()], "seed": "1"})
    except InputError as error:
        return str(error)
    return None


def test_ranks_with_other_data_are_named_on_every_rank():
    texts = run_ranks(3, compare, ["old", "new", "old"])
    assert texts == ["all ranks: data: found ranks 0, 2: old; ranks 1: new; expected the same on every rank"] * 3
    assert run_ranks(2, compare, ["same", "same"]) == [None, None]


def leave_out(directory: Path):
    """Rank 1 leaves rows out in the second step, both do in the third; three are too many."""
    groups = make_process_groups(connect())
    rank = dist.get_rank()
    account = SkippedRows(2, directory, groups)
    damage = DamagedDataError(f"shard of rank {rank}", 512, "crc32 1", "crc32 2", 3)
    account.count(1, [], 0)
    account.count(2, [SkippedRow(9, 3, damage)] if rank else [], 1)
    try:
        account.count(3, [SkippedRow(12 + rank, rank, damage)], 2)
    except SkipBudgetError as error:
        return account.total, str(error)
    return account.total, None


def test_rows_that_any_rank_leaves_out_count_on_all(tmp_path):
    results = run_ranks(2, leave_out, tmp_path)
    assert results[0] == results[1]
    total, message = results[0]
    assert total == 3 and "3 rows were left out" in message
    records = [json.loads(line) for line in (tmp_path / ERRORS_NAME).read_text().splitlines()]
    assert [(record["step"], record["row"], record["shard"]) for record in records] == [
        (2, 9, "shard of rank 1"),
        (3, 12, "shard of rank 0"),
        (3, 13, "shard of rank 1"),
    ]
