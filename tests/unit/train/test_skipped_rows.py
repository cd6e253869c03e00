"""The account of rows that were left out, on one process."""

import json

import pytest

from ebft_mega.data.rows.loader import SkippedRow
from ebft_mega.errors import DamagedDataError, SkipBudgetError
from ebft_mega.runtime.run_files import DATA_ERRORS_NAME
from ebft_mega.train.skipped_rows import account_for


def row(number):
    return SkippedRow(number, number % 4, DamagedDataError("shard-000001.tar", 512, "crc32 1", "crc32 2", 7))


def test_rows_are_written_down_and_stop_the_run_beyond_the_budget(groups, tmp_path):
    account_for(2, [row(5)], 1, 3, tmp_path, groups)
    account_for(3, [row(9), row(10)], 3, 3, tmp_path, groups)
    with pytest.raises(SkipBudgetError, match=r"step 5: 4 rows were left out.* allow 3.*data_errors.jsonl") as caught:
        account_for(5, [row(17)], 4, 3, tmp_path, groups)
    assert caught.value.exit_code == 4
    records = [json.loads(line) for line in (tmp_path / DATA_ERRORS_NAME).read_text().splitlines()]
    assert [(record["step"], record["row"], record["row_in_batch"]) for record in records] == [
        (2, 5, 1),
        (3, 9, 1),
        (3, 10, 2),
        (5, 17, 1),
    ]
    assert records[0] | {"step": 0, "row": 0, "row_in_batch": 0} == {
        "step": 0,
        "row": 0,
        "row_in_batch": 0,
        "shard": "shard-000001.tar",
        "offset": 512,
        "document": 7,
        "expected": "crc32 1",
        "found": "crc32 2",
    }
