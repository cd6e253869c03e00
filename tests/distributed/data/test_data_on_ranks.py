"""Ranks check that they have the same data, and agree on how many rows were left out."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from ebft_mega.data.rows.loader import LoadedBatch, SkippedRow
from ebft_mega.errors import DamagedDataError, InputError, SkipBudgetError
from ebft_mega.lifecycle.connecting import require_same_inputs
from ebft_mega.parallel.groups import connect, make_process_groups
from ebft_mega.registry.plugins import use_plugins
from ebft_mega.runtime.agreement import require_agreement
from ebft_mega.runtime.run_files import DATA_ERRORS_NAME
from ebft_mega.train import loop
from ebft_mega.train.hooks import step_hooks
from ebft_mega.train.observer import Observer
from ebft_mega.train.progress import Progress
from ebft_mega.train.skipped_rows import account_for
from tests.distributed.ranks import run_ranks
from tests.distributed.steps import rows_of_step
from tests.distributed.train.test_non_finite import Beats, Lines, QuietBoundary, build
from tests.unit.checkpoint.folder_stand_ins import run_config


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


def compare_plugins(directory):
    """What a rank says whose copy of a plugin is another one than the first rank's."""
    connect()
    folder = Path(directory) / str(dist.get_rank())
    folder.mkdir()
    text = Path("examples/inverse_square_root.py").read_text()
    (folder / "own.py").write_text(text + "# another copy\n" * (dist.get_rank() == 1))
    (plugin,) = use_plugins(["own.py"], folder, {})
    config = run_config(Path(directory)).with_plugins((replace(plugin, resolved="own.py"),))
    loader = SimpleNamespace(state=SimpleNamespace(to_json=lambda: "{}"))
    try:
        require_same_inputs(config, SimpleNamespace(evaluation_rows=None), loader)
    except InputError as error:
        return str(error)
    return None


def test_ranks_with_other_code_of_a_plugin_are_named_on_every_rank(tmp_path):
    text, other = run_ranks(2, compare_plugins, str(tmp_path))
    assert text == other
    assert re.fullmatch(
        r"all ranks: plugins: found ranks 0: own\.py \(sha256 [0-9a-f]{12}\); "
        r"ranks 1: own\.py \(sha256 [0-9a-f]{12}\); expected the same on every rank",
        text,
    )


class HalfDamaged:
    """Stands for the loader of two ranks that are one replica; only the second one finds a row of step 2 damaged.

    In step 3 a row is left out as `data.skip_rows` asks.
    """

    skips_damaged_rows = True
    state = SimpleNamespace(next_row=0, sequence_length=1, sources=(SimpleNamespace(rows=0),), skipped_rows=0)
    stream = SimpleNamespace(
        sources=(SimpleNamespace(dataset=SimpleNamespace(manifest=SimpleNamespace(eos_id=3, tokens=1))),)
    )

    def __init__(self, groups):
        self.groups, self.left_out = groups, []

    def __iter__(self):
        for step in range(3):
            rows, skipped = rows_of_step(0, self.groups), ()
            if step == 1 and dist.get_rank() == 1:
                indices = rows.row_indices.clone()
                indices[0] = -1
                rows = replace(rows, row_indices=indices)
                skipped = (SkippedRow(40, 0, DamagedDataError("a shard", 512, "crc32 1", "crc32 2", 3)),)
            if step == 2:
                rows = replace(rows, row_indices=torch.tensor([0, -1, 2, 3]))
            yield LoadedBatch(rows, skipped, left_out=int(step == 2))

    def commit(self, skipped_rows):
        self.left_out.append(skipped_rows)


def train_on_half_damaged(directory, tensor, pipeline):
    """Damaged rows and rows left out by step, and the parameters' sum, after three steps."""
    more = ("data.on_error=skip", *ANY_NUMBER, "data.skip_rows=[[9,9]]")
    trainer = build(directory, tensor, pipeline, f"output_dir={directory}", *more)
    loader = HalfDamaged(trainer.groups)
    lines = Lines()
    observer = Observer(lines, Path(directory) / "samples.jsonl", None)
    hooks = step_hooks(trainer, None, 3, QuietBoundary(), observer, Beats())
    loop.train(trainer, loader, 3, Progress(), hooks, Beats())
    left_out = [metrics["data/left_out_rows"] for _, metrics in lines.logged]
    total = sum(float(values.double().sum()) for _, values in trainer.engine.local_parameters())
    return loader.left_out, left_out, total


ANY_NUMBER = ("data.max_skipped_rows=100", "data.max_skipped_share=1")


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)], ids=["tensor", "pipeline"])
def test_a_row_that_one_rank_of_a_replica_cannot_read_is_left_out_by_all(tmp_path, tensor, pipeline):
    """Without agreement the ranks would wait for each other for ever."""
    results = run_ranks(2, train_on_half_damaged, str(tmp_path), tensor, pipeline)
    assert [(skipped, left_out) for skipped, left_out, _ in results] == [([0, 1, 0], [0.0, 0.0, 1.0])] * 2
    assert all(math.isfinite(total) for *_, total in results)
    (record,) = [json.loads(line) for line in (tmp_path / DATA_ERRORS_NAME).read_text().splitlines()]
    assert (record["step"], record["row"], record["shard"]) == (2, 40, "a shard")


def leave_out(directory: Path):
    """Rank 1 leaves rows out in the second step, both do in the third; three are too many."""
    groups = make_process_groups(connect())
    rank = dist.get_rank()
    damage = DamagedDataError(f"shard of rank {rank}", 512, "crc32 1", "crc32 2", 3)
    account_for(2, [SkippedRow(9, 3, damage)] if rank else [], 1, 2, directory, groups)
    try:
        account_for(3, [SkippedRow(12 + rank, rank, damage)], 3, 2, directory, groups)
    except SkipBudgetError as error:
        return str(error)
    return None


def test_rows_that_any_rank_leaves_out_count_on_all(tmp_path):
    results = run_ranks(2, leave_out, tmp_path)
    assert results[0] == results[1]
    assert "3 rows were left out" in results[0]
    records = [json.loads(line) for line in (tmp_path / DATA_ERRORS_NAME).read_text().splitlines()]
    assert [(record["step"], record["row"], record["shard"]) for record in records] == [
        (2, 9, "shard of rank 1"),
        (3, 12, "shard of rank 0"),
        (3, 13, "shard of rank 1"),
    ]
