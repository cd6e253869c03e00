"""Between two steps: a request to one rank applies to all, and a checkpoint is committed on all ranks or on none."""

import os
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ebft_mega.checkpoint import saver as saver_module
from ebft_mega.checkpoint.commit import complete_folders, leftovers, newest
from ebft_mega.checkpoint.manifest import file_problems, read_manifest, unlisted_files
from ebft_mega.checkpoint.saver import CheckpointSaver
from ebft_mega.errors import CheckpointError, DirectoryLostError, LockLostError
from ebft_mega.metrics.announcer import Announcer
from ebft_mega.runtime.run_lock import Loss
from ebft_mega.runtime.stop_requests import StopReason
from ebft_mega.train.progress import Progress
from ebft_mega.train.step_boundary import Boundary
from tests.distributed.ranks import run_ranks
from tests.distributed.train.test_non_finite import build

ASKED_RANK = 1


class Requests:
    """What one rank is asked for, as the test says."""

    def __init__(self):
        self.stop, self.save, self.taken = StopReason.NONE, False, []

    def stop_reason(self):
        return self.stop

    def save_requested(self):
        return self.save

    def take_save(self):
        self.taken.append("save")
        self.save = False

    def take_stop(self):
        self.taken.append("stop")


class Bench:
    """A boundary of two ranks, and what it said."""

    def __init__(self, directory, *overrides):
        self.root = Path(directory) / "checkpoints"
        trainer = build(directory, 1, 1, f"output_dir={directory}", *overrides)
        self.requests, self.said = Requests(), []
        self.saver = CheckpointSaver(self.root, trainer.groups, keep_last=2, keep_every=None)
        self.lost, self.beats = Loss.NONE, []
        self.boundary = Boundary(
            trainer,
            self.saver,
            self.requests,
            lambda: self.lost,
            lambda progress: {"state.json": b"{}"},
            Announcer(self.hear),
            self.beats.append,
            begun=Progress(pending=None),
            saved=None,
        )

    def hear(self, text):
        """Keep what is said of outcomes; that they are waited for is said, too."""
        if not text.startswith("end: waiting until the checkpoint of step "):
            self.said.append(text)

    def cross(self, step, is_due=False):
        return self.boundary.cross(Progress(step=step, pending=None), is_due)

    @property
    def is_asked(self):
        return dist.get_rank() == ASKED_RANK

    @property
    def folders(self):
        dist.barrier()
        return [path.name for path in complete_folders(self.root)]


def stop_at_the_start(directory):
    bench = Bench(directory)
    bench.requests.stop = StopReason.STOP_FILE if bench.is_asked else StopReason.NONE
    found = bench.cross(0), bench.folders, bench.requests.taken
    bench.requests.save = bench.is_asked  # asked for by name
    return (*found, bench.cross(0), bench.folders)


def test_a_stop_before_the_first_step_needs_no_checkpoint(tmp_path):
    for stop, folders, taken, again, saved in run_ranks(2, stop_at_the_start, str(tmp_path)):
        assert stop is again is StopReason.STOP_FILE and folders == [] and taken[:1] == ["stop"]
        assert saved == ["step-00000000"]


def held_back(bench):
    """Let no thread of this rank write until the event is set."""
    go, write = threading.Event(), saver_module.write_state_shards

    def wait_and_write(*arguments):
        go.wait(60)
        return write(*arguments)

    saver_module.write_state_shards = wait_and_write
    return go


def save_on_request(directory):
    bench = Bench(directory)
    go = held_back(bench) if bench.is_asked else threading.Event()
    bench.requests.save = bench.is_asked
    if dist.get_rank() == 0:  # of a save that never ended
        stale = bench.root / "step-00000001.tmp" / "weights" / "rank-00007.safetensors"
        stale.parent.mkdir(parents=True)
        stale.touch()
    found = [(bench.cross(1), bench.saver.in_flight, bench.folders)]
    found.append((bench.cross(2), bench.saver.in_flight, bench.folders))  # one rank is not done yet
    go.set()
    bench.boundary.finish()
    found.append((bench.cross(3), bench.saver.in_flight, bench.folders))
    manifest = read_manifest(bench.root / "step-00000001")
    whole = file_problems(bench.root / "step-00000001", manifest, list(manifest.files))
    foreign = unlisted_files(bench.root / "step-00000001", manifest)
    return found, bench.requests.taken, whole, foreign, newest(bench.root), len(bench.said)


def test_a_save_request_to_one_rank_is_committed_when_all_ranks_have_written(tmp_path):
    for found, taken, problems, foreign, latest, said in run_ranks(2, save_on_request, str(tmp_path)):
        assert found == [
            (StopReason.NONE, True, []),
            (StopReason.NONE, True, []),
            (StopReason.NONE, False, ["step-00000001"]),
        ]
        assert taken == ["save"] and problems == [] and foreign == []
        assert latest == "step-00000001" and said == 1


def stop_on_request(directory):
    bench = Bench(directory)
    progress = Progress(step=7)
    before = bench.boundary.stop_requested(progress)
    bench.requests.stop = StopReason.SIGUSR1 if bench.is_asked else StopReason.NONE
    during = bench.boundary.stop_requested(progress)
    bench.requests.stop = StopReason.NONE  # a request that was heard stays
    return before, during, bench.cross(7), bench.folders, bench.requests.taken, bench.saver.in_flight


def test_one_rank_s_signal_stops_all_with_a_complete_checkpoint(tmp_path):
    for result in run_ranks(2, stop_on_request, str(tmp_path)):
        assert result == (False, True, StopReason.SIGUSR1, ["step-00000007"], ["stop"], False)


def save_in_an_evaluation(directory):
    bench = Bench(directory)
    bench.requests.save = bench.is_asked
    stops = bench.boundary.stop_requested(Progress(step=5, pending={"train/loss": 1.0}))
    taken = list(bench.requests.taken)
    bench.boundary.finish()
    return stops, taken, bench.folders, len(bench.said), len(bench.beats) > 0


def test_a_save_request_is_heard_in_an_evaluation(tmp_path):
    for result in run_ranks(2, save_in_an_evaluation, str(tmp_path)):
        assert result == (False, ["save"], ["step-00000005"], 1, True)


def lose(directory, lost):
    bench = Bench(directory)
    bench.lost = lost if dist.get_rank() == 0 else Loss.NONE
    try:
        bench.cross(5, is_due=True)
    except (LockLostError, DirectoryLostError) as error:
        return type(error), str(error), bench.folders
    return None


@pytest.mark.parametrize(
    ("lost", "kind", "words"),
    [
        (Loss.LOCK, LockLostError, "another run has taken the run directory over: see its run.lock"),
        (Loss.DIRECTORY, DirectoryLostError, "the run directory was removed or renamed while the run was running"),
    ],
)
def test_a_run_that_lost_its_directory_writes_nothing_more(tmp_path, lost, kind, words):
    for found, message, folders in run_ranks(2, lose, str(tmp_path), lost):
        assert found is kind and message.endswith(words) and folders == []


def fail_to_point(directory):
    bench = Bench(directory)

    def full(*_):
        raise OSError(28, os.strerror(28))

    saver_module.point_latest = full
    bench.cross(1, is_due=True)
    bench.boundary.finish()
    return bench.folders, bench.said


def test_a_checkpoint_that_has_its_name_counts_even_if_latest_does_not_say_so(tmp_path):
    for folders, said in run_ranks(2, fail_to_point, str(tmp_path)):
        assert folders == ["step-00000001"] and "complete" in said[0]


def retention_and_repetition(directory):
    bench = Bench(directory)
    for step in (1, 2, 3):
        bench.cross(step, is_due=True)
    bench.requests.save = bench.is_asked
    bench.cross(3)  # is saved already
    bench.boundary.finish()
    return bench.folders, len(bench.said)


def test_next_checkpoint_waits_for_the_last_one_and_old_ones_go(tmp_path):
    for folders, said in run_ranks(2, retention_and_repetition, str(tmp_path)):
        assert folders == ["step-00000003", "step-00000002"] and said == 3


def fail_to_write(directory, on_error):
    bench = Bench(directory, f"checkpoint.on_error={on_error}")
    bench.cross(1, is_due=True)
    bench.boundary.finish()
    if bench.is_asked:

        def full(*_):
            raise OSError(28, os.strerror(28))

        saver_module.write_state_shards = full
    bench.cross(2, is_due=True)
    failure = None
    try:
        bench.boundary.finish()
        if dist.get_rank() == 0:
            bench.requests.stop = StopReason.SIGTERM
        bench.cross(3)
    except CheckpointError as error:
        failure = str(error)
    dist.barrier()
    return bench.folders, newest(bench.root), [path.name for path in leftovers(bench.root)], bench.said, failure


@pytest.mark.parametrize("on_error", ["continue", "stop"])
def test_one_rank_s_full_disk_fails_the_checkpoint_on_all(tmp_path, on_error):
    for folders, latest, left, said, failure in run_ranks(2, fail_to_write, str(tmp_path), on_error):
        assert folders == ["step-00000001"] and latest == "step-00000001" and left == []
        assert "rank 1: [Errno 28] No space left on device" in said[1] and "step 2 FAILED" in said[1]
        expected = "the checkpoint of step 2 could not be written" if on_error == "stop" else "SIGTERM) at step 3"
        assert expected in failure


def end_without_a_word(directory):
    bench = Bench(directory)
    if bench.is_asked:

        def leave(*_):
            raise SystemExit

        saver_module.write_state_shards = leave
    bench.cross(1, is_due=True)
    bench.boundary.finish()
    return bench.folders, [path.name for path in leftovers(bench.root)], bench.said


def test_a_rank_that_wrote_nothing_is_no_rank_that_had_nothing_to_write(tmp_path):
    for folders, left, said in run_ranks(2, end_without_a_word, str(tmp_path)):
        assert folders == [] and left == []
        assert said == ["checkpoint of step 1 FAILED: rank 1: its thread ended without a word"]


def no_room(directory):
    bench = Bench(directory)
    if dist.get_rank() == 0:
        saver_module.shutil = type("Disk", (), {"disk_usage": staticmethod(lambda _: type("Use", (), {"free": 1000}))})
    bench.cross(1, is_due=True)
    return bench.folders, bench.saver.in_flight, bench.said


def test_room_on_the_disk_is_looked_for_before_anything_is_written(tmp_path):
    for folders, in_flight, said in run_ranks(2, no_room, str(tmp_path)):
        assert folders == [] and not in_flight
        assert "GB are needed, 0.000 GB are free" in said[0]


def later_training(directory):
    bench = Bench(directory)
    trainer = bench.boundary._trainer
    go = held_back(bench)
    before = {name: values.clone() for name, values in trainer.engine.local_parameters()}
    bench.cross(1, is_due=True)
    with torch.no_grad():
        trainer.engine.restore(lambda kind, name: torch.zeros_like(before[name]), applied_updates=1)
    go.set()
    bench.boundary.finish()
    return bench.folders


def test_what_is_written_is_what_was_there_when_it_began(tmp_path):
    from tests.distributed.runs import tensors

    assert run_ranks(2, later_training, str(tmp_path)) == [["step-00000001"]] * 2
    written = tensors(tmp_path / "checkpoints" / "step-00000001")
    assert all(values.any() for (kind, _), values in written.items() if kind == "weights")
