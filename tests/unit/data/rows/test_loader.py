import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ebft_mega.data.rows.loader import BatchLoader, LoadedBatch
from ebft_mega.data.rows.row_ranges import RowRanges
from ebft_mega.data.rows.stream import RowStream, Source
from ebft_mega.data.store.dataset import Dataset
from ebft_mega.errors import DamagedDataError, InputError
from tests.unit.data.memory_dataset import EOS, damage, memory_dataset

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than there are cores

ROOT = Path(__file__).resolve().parents[4]


def small_dataset(name: str = "a") -> Dataset:
    return memory_dataset([[[2 + 10 * shard + number] * 7 for number in range(10)] for shard in range(4)], name=name)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_damage_reaches_the_consumer_in_its_place(workers: int) -> None:
    dataset = small_dataset()
    damage(dataset, 10)
    loader = BatchLoader(RowStream.of(dataset, 8, None), 4, workers=workers)
    batches = iter(loader)
    next(batches), next(batches)
    with pytest.raises(DamagedDataError) as caught:
        next(batches)
    assert (caught.value.shard, caught.value.document) == ("memory/shard-000001.tar", 10)
    assert caught.value.expected.startswith("crc32 ")
    assert caught.value.expected != caught.value.found


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_row_becomes_filler_where_that_is_wanted(workers: int) -> None:
    dataset = small_dataset()
    whole = [batch.rows for batch in itertools.islice(BatchLoader(RowStream.of(dataset, 8, None), 4), 6)]
    damage(dataset, 10)
    damage(dataset, 21)
    loader = BatchLoader(RowStream.of(dataset, 8, None), 4, 1, 2, workers=workers, on_error="skip")  # rows 2, 3 of 4
    batches = list(itertools.islice(loader, 6))
    assert [len(batch.skipped) for batch in batches] == [0, 0, 1, 0, 0, 0]  # 21 is row 1 of batch 5: another rank's
    (skipped,) = batches[2].skipped
    assert (skipped.number, skipped.index, skipped.damage.document) == (10, 2, 10)
    for number, (batch, expected) in enumerate(zip(batches, whole, strict=True)):
        if number == 2:
            assert batch.rows.row_indices.tolist() == [-1, 3]
            assert batch.rows.tokens[0].tolist() == [EOS] * 8
            assert len(batch.rows.document_ids[0].unique()) == 1
            assert torch.equal(batch.rows.tokens[1], expected.tokens[3])
        else:
            assert batch.rows.row_indices.tolist() == [2, 3]
            assert torch.equal(batch.rows.tokens, expected.tokens[2:])
            assert torch.equal(batch.rows.document_ids, expected.document_ids[2:])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [1, 2])
def test_rows_that_are_left_out_become_filler_unread_and_all_others_keep_their_place(workers: int, size: int) -> None:
    dataset = small_dataset()
    whole = [batch.rows for batch in itertools.islice(BatchLoader(RowStream.of(dataset, 8, None), 4), 5)]
    damage(dataset, 6)  # its row is among those that are left out: nobody notices
    stream = RowStream.of(dataset, 8, None)
    left_out = RowRanges(((3, 6), (12, 15)))
    for rank in range(size):
        loader = BatchLoader(stream, 4, rank, size, workers=workers, left_out=left_out)
        own = slice(4 // size * rank, 4 // size * (rank + 1))
        for number, (batch, expected) in enumerate(zip(itertools.islice(loader, 5), whole, strict=True)):
            assert batch.skipped == () and batch.left_out == [1, 3, 0, 4, 0][number]
            for place, index in enumerate(range(4)[own]):
                row = batch.rows.row_indices[place].item(), batch.rows.tokens[place].tolist()
                if 4 * number + index in left_out:
                    assert row == (-1, [EOS] * 8) and len(batch.rows.document_ids[place].unique()) == 1
                else:
                    assert row == (index, expected.tokens[index].tolist())
                    assert torch.equal(batch.rows.document_ids[place], expected.document_ids[index])


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("size", [1, 2])
def test_all_ranks_end_at_the_same_step(workers: int, size: int) -> None:
    stream = RowStream([Source("a", small_dataset(), max_epochs=1)], 8, seed=1)
    assert stream.total_rows == 40
    for rank in range(size):
        loader = BatchLoader(stream, 6, rank, size, next_row=2, workers=workers)
        assert len(list(loader)) == 6  # rows 2 to 37; 38 and 39 are no whole batch
    for _ in range(6):
        loader.commit()
    assert list(loader) == []


def test_reading_ahead_does_not_touch_the_runs_random_numbers() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    for workers in (0, 1):
        torch.manual_seed(5)
        next(iter(BatchLoader(RowStream.of(small_dataset(), 8, 0), 2, workers=workers)))
        assert torch.equal(torch.rand(3), expected)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="has an accelerator")
def test_pinned_memory_needs_an_accelerator() -> None:
    with pytest.raises(ValueError, match="accelerator"):
        BatchLoader(RowStream.of(small_dataset(), 8, 0), 2, pin_memory=True)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="pinned memory needs an accelerator")
@pytest.mark.parametrize("workers", [0, 1])
def test_pinned_batches_hold_the_same_rows(workers: int) -> None:
    stream = RowStream.of(small_dataset(), 8, 0)
    batch: LoadedBatch = next(iter(BatchLoader(stream, 2, workers=workers, pin_memory=True)))
    assert batch.rows.tokens.is_pinned()
    assert batch.rows.document_ids.is_pinned()
    assert batch.rows.tokens[1].tolist() == stream.row(1).tokens.tolist()


def test_resuming_with_changed_data_is_refused_and_moves_nothing() -> None:
    saved = BatchLoader(RowStream.of(small_dataset(), 8, 0), 4, next_row=20).state
    loader = BatchLoader(RowStream.of(small_dataset("b"), 8, 1), 4)
    with pytest.raises(InputError) as caught:
        loader.resume(saved)
    assert [problem.key for problem in caught.value.problems] == ["seed", "data.sources"]
    assert loader.state.next_row == 0
    assert loader.resume(saved, allow_changed=True)
    assert loader.state.next_row == 20


def test_another_sequence_length_resumes_at_the_same_token() -> None:
    saved = BatchLoader(RowStream.of(small_dataset(), 8, 0), 4, next_row=20).state
    loader = BatchLoader(RowStream.of(small_dataset(), 12, 0), 4)
    notes = loader.resume(saved, allow_changed=True)
    assert loader.state.next_row == 14  # 160 tokens, rounded up to 168
    assert any("row 20 of 8 tokens became row 14 of 12 tokens" in note for note in notes)
    assert any("seen twice or missed" in note for note in notes)


def test_a_run_does_not_resume_after_the_end_of_its_data() -> None:
    longer = RowStream([Source("a", small_dataset(), max_epochs=2)], 8, 0)
    shorter = RowStream([Source("a", small_dataset(), max_epochs=1)], 8, 0)
    saved = BatchLoader(longer, 4, next_row=60).state
    with pytest.raises(InputError, match="next_row"):
        BatchLoader(shorter, 4).resume(saved, allow_changed=True)


def test_skipped_rows_are_counted_through_stops() -> None:
    stream = RowStream.of(small_dataset(), 8, 0)
    loader = BatchLoader(stream, 4)
    loader.commit(skipped_rows=2)
    loader.commit()
    assert loader.state.skipped_rows == 2
    resumed = BatchLoader(stream, 2)
    assert resumed.resume(loader.state) == []
    resumed.commit(skipped_rows=1)
    assert (resumed.state.next_row, resumed.state.skipped_rows) == (10, 3)


WITH_WORKERS = """
import multiprocessing, os, signal, sys
sys.path.insert(0, {root!r})
from tests.unit.data.rows.test_loader import small_dataset
from ebft_mega.data.rows.loader import BatchLoader
from ebft_mega.data.rows.stream import RowStream
batches = iter(BatchLoader(RowStream.of(small_dataset(), 8, 0), 4, workers=2))
next(batches)
pids = [child.pid for child in multiprocessing.active_children()]
{what}
"""
ORPHANED = "print(*pids, flush=True); signal.pause()"
KILLED = "os.kill(pids[0], signal.SIGKILL); [next(batches) for _ in range(20)]"  # some were read ahead


@pytest.mark.slow  # a worker looks for its parent every few seconds
def test_workers_end_with_a_parent_that_was_killed() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", WITH_WORKERS.format(root=str(ROOT), what=ORPHANED)], stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    workers = []
    try:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        parent.kill()
        parent.wait(60)
        deadline = time.monotonic() + 60
        while any(is_running(pid) for pid in workers):
            assert time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        for pid in (*workers, parent.pid):
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)
        parent.wait(60)
        parent.stdout.close()


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_worker_processes_end_with_the_iteration() -> None:
    before = set(multiprocessing.active_children())
    batches = iter(BatchLoader(RowStream.of(small_dataset(), 8, 0), 4, workers=2))
    next(batches)
    mine = set(multiprocessing.active_children()) - before
    assert len(mine) == 2
    batches.close()  # type: ignore[attr-defined]
    assert not any(worker.is_alive() for worker in mine)


def test_a_worker_that_was_killed_is_an_error_and_no_wait() -> None:
    # In a process of its own: torch raises wherever the main thread is when the signal comes.
    command = [sys.executable, "-c", WITH_WORKERS.format(root=str(ROOT), what=KILLED)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 1
    assert "RuntimeError: DataLoader worker" in answer.stderr


def test_batches_are_made_of_int64() -> None:
    rows = next(iter(BatchLoader(RowStream.of(small_dataset(), 8, 0), 4))).rows
    assert {rows.tokens.dtype, rows.document_ids.dtype, rows.row_indices.dtype} == {torch.int64}
    assert np.array_equal(rows.row_indices.numpy(), np.arange(4))
