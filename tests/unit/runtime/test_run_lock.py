"""The lock of a run directory: who is refused, who takes over, and what happens when several do so at once."""

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ebft_mega.errors import InputError
from ebft_mega.runtime import run_lock
from ebft_mega.runtime.run_lock import LOCK_NAME, Holder, Loss, RunLock, clock_of

ROOT = Path(__file__).resolve().parents[3]
SECONDS = 30
HOLD = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from ebft_mega.runtime.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""
OTHER_BOOT = "00000000-0000-0000-0000-000000000000"


@pytest.fixture
def other_process(tmp_path):
    """Another process that holds the lock of `tmp_path`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(root=str(ROOT)), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate(timeout=SECONDS)


@pytest.fixture
def elsewhere(monkeypatch):
    """A holder on a machine that cannot be looked into; nothing of a Slurm job."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    return dataclasses.replace(Holder.of_this_process(), host="node07", boot=OTHER_BOOT)


@pytest.fixture
def still(monkeypatch, tmp_path):
    """Time stands still, for the file system too: ages are what they are however busy the machine is."""
    now = clock_of(tmp_path)
    monkeypatch.setattr(run_lock, "clock_of", lambda directory: now)


def write(directory, text, age_seconds=0.0):
    """A lock file that was renewed so long ago; a `Holder` or any text."""
    path = directory / LOCK_NAME
    path.write_text(text if isinstance(text, str) else text.to_json())
    modified = run_lock.clock_of(directory) - age_seconds
    os.utime(path, (modified, modified))
    return path


def refusal(directory):
    """What a second run is told."""
    before = (directory / LOCK_NAME).read_text()
    with pytest.raises(InputError) as caught, RunLock(directory):
        pass
    assert caught.value.exit_code == 2
    (problem,) = caught.value.problems
    assert (problem.where, problem.key) == (str(directory / LOCK_NAME), "output_dir")
    assert (directory / LOCK_NAME).read_text() == before and os.listdir(directory) == [LOCK_NAME]
    return problem


def test_a_lock_names_its_holder_and_goes_with_it(tmp_path):
    with RunLock(tmp_path) as lock:
        content = json.loads((tmp_path / LOCK_NAME).read_text())
        assert content["pid"] == os.getpid() and content["host"] and content["started"].endswith("+00:00")
        assert lock.notes == () and not lock.lost
    assert os.listdir(tmp_path) == []


def test_a_second_run_is_refused_while_the_first_one_lives(tmp_path, other_process):
    problem = refusal(tmp_path)
    holder = Holder.from_json((tmp_path / LOCK_NAME).read_text())
    assert holder.pid == other_process.pid and problem.found == f"the lock of {holder}, which is running"
    # However old its lock is: the thread that renews it may have been held up.
    os.utime(tmp_path / LOCK_NAME, (1, 1))
    refusal(tmp_path)
    other_process.stdin.write("\n")
    other_process.stdin.flush()
    assert other_process.wait(SECONDS) == 0
    with RunLock(tmp_path) as lock:
        assert lock.notes == ()


def test_the_lock_of_a_process_that_was_killed_is_taken_over(tmp_path, other_process):
    other_process.kill()
    other_process.wait(SECONDS)
    with RunLock(tmp_path) as lock:
        (note,) = lock.notes
        assert f"process {other_process.pid} on " in note and note.endswith("that process has ended")
        assert Holder.from_json((tmp_path / LOCK_NAME).read_text()).pid == os.getpid()


def test_another_process_with_the_same_number_is_another_one(tmp_path):
    """Process numbers are used again."""
    mine = Holder.of_this_process()
    write(tmp_path, dataclasses.replace(mine, process_start=mine.process_start - 1))
    with RunLock(tmp_path) as lock:
        assert lock.notes


def test_a_process_of_which_only_the_exit_code_is_left_has_ended(tmp_path, other_process):
    other_process.kill()
    os.waitid(os.P_PID, other_process.pid, os.WEXITED | os.WNOWAIT)  # still a zombie
    with RunLock(tmp_path) as lock:
        assert lock.notes


@pytest.mark.parametrize("change", [{"boot": OTHER_BOOT}, {"pid_namespace": "pid:[1]"}, {"boot": None}])
def test_elsewhere_only_the_age_counts(tmp_path, still, elsewhere, change):
    """Another machine, another container of this machine, a system that does not say: the number says nothing."""
    holder = dataclasses.replace(Holder.of_this_process(), host="node07", pid=4, process_start=1, **change)
    write(tmp_path, holder, age_seconds=60)
    problem = refusal(tmp_path)
    assert problem.found == f"the lock of process 4 on node07, started {holder.started}, renewed 60 s ago"
    assert problem.expected.endswith("start again in 240 s or delete the file")
    write(tmp_path, holder, age_seconds=301)
    with RunLock(tmp_path) as lock:
        assert lock.notes == (f"took over the lock of {holder}: it was not renewed for 301 s",)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "{}", '{"pid": 1}', "\x00" * 40])
def test_a_lock_that_says_nothing_is_only_judged_by_its_age(tmp_path, still, text):
    write(tmp_path, text, age_seconds=5)
    assert refusal(tmp_path).found == "the lock of a run that it does not name, renewed 5 s ago"
    write(tmp_path, text, age_seconds=400)
    with RunLock(tmp_path) as lock:
        assert lock.notes == ("took over the lock of an unknown run: it was not renewed for 400 s",)


def test_the_requeued_job_takes_over_its_own_lock_wherever_it_runs(tmp_path, elsewhere, monkeypatch):
    earlier = dataclasses.replace(elsewhere, slurm_job_id="812", slurm_restart_count=1)
    monkeypatch.setenv("SLURM_JOB_ID", "812")
    for restart_count in ("0", "1"):  # another step of the same start may well be running
        monkeypatch.setenv("SLURM_RESTART_COUNT", restart_count)
        write(tmp_path, earlier)
        refusal(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    with RunLock(tmp_path) as lock:
        assert lock.notes == (f"took over the lock of {earlier}: its job was requeued",)
    monkeypatch.setenv("SLURM_JOB_ID", "813")
    write(tmp_path, earlier)
    refusal(tmp_path)


def test_a_lock_is_renewed_and_never_somebody_elses(tmp_path, monkeypatch, elsewhere):
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.01)
    with RunLock(tmp_path) as lock:
        os.utime(tmp_path / LOCK_NAME, (1, 1))
        wait_until(lambda: clock_of(tmp_path) - (tmp_path / LOCK_NAME).stat().st_mtime < 5)
        # Not written in place: its renewal might come in between.
        (tmp_path / "new").write_text(elsewhere.to_json())
        os.utime(tmp_path / "new", (1, 1))
        (tmp_path / "new").rename(tmp_path / LOCK_NAME)
        assert lock.lost is Loss.LOCK
        wait_until(lambda: not any(thread.name == "run-lock" for thread in threading.enumerate()))
        assert (tmp_path / LOCK_NAME).stat().st_mtime == 1
    assert (tmp_path / LOCK_NAME).read_text() == elsewhere.to_json()


def wait_until(condition):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("change", ["another takes over", "the holder comes back", "it is released"])
def test_what_was_judged_is_what_is_taken(tmp_path, monkeypatch, still, elsewhere, change):
    """Between the judgement and the taking the lock becomes another one."""
    stale = dataclasses.replace(elsewhere, token="stale")
    path = write(tmp_path, stale, age_seconds=1000)
    claim = RunLock._claim

    def change_first(lock, judged):
        monkeypatch.setattr(RunLock, "_claim", claim)
        if change == "another takes over":
            write(tmp_path, dataclasses.replace(elsewhere, token="fresh"))
        elif change == "the holder comes back":
            os.utime(path)
        else:
            path.unlink()
        return claim(lock, judged)

    monkeypatch.setattr(RunLock, "_claim", change_first)
    if change == "it is released":
        with RunLock(tmp_path) as lock:
            assert lock.notes == ()
        assert os.listdir(tmp_path) == []
        return
    with pytest.raises(InputError, match="renewed 0 s ago"), RunLock(tmp_path):
        pass
    expected = "fresh" if change == "another takes over" else "stale"
    assert Holder.from_json(path.read_text()).token == expected and os.listdir(tmp_path) == [LOCK_NAME]


def test_a_taker_that_died_on_the_way_stops_others_for_a_while_only(tmp_path, monkeypatch, elsewhere):
    class Died(BaseException):
        """Ends a start where a kill would."""

    def die(*arguments, **options):
        raise Died

    write(tmp_path, elsewhere, age_seconds=1000)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        patch.setattr(Path, "unlink", die)
        with pytest.raises(Died), RunLock(tmp_path):
            pass
    with pytest.raises(InputError, match="another start is taking over"), RunLock(tmp_path):
        pass
    (claim,) = tmp_path.glob(f"{LOCK_NAME}.*")
    os.utime(claim, (1, 1))
    with RunLock(tmp_path) as lock:
        assert lock.notes and not lock.lost
    assert os.listdir(tmp_path) == []


@pytest.fixture
def quick_looks(monkeypatch):
    monkeypatch.setattr(run_lock, "LOOK_AGAIN_SECONDS", (0.01, 0.05))


DAMAGES = {
    "deleted": lambda path: path.unlink(),
    "renamed": lambda path: path.rename(path.with_name("old")),
    "emptied": lambda path: path.write_text(""),
    "overwritten": lambda path: path.write_text("no lock"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_lock_file_that_only_vanished_is_made_anew(tmp_path, damage, quick_looks, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ebft_mega"), "propagate", True)
    with RunLock(tmp_path) as lock:
        text = (tmp_path / LOCK_NAME).read_text()
        DAMAGES[damage](tmp_path / LOCK_NAME)
        assert lock.lost is Loss.NONE
        assert (tmp_path / LOCK_NAME).read_text() == text
        assert sum("made anew" in record.message for record in caplog.records) == 1
        (tmp_path / "old").unlink(missing_ok=True)
        refusal(tmp_path)  # a second run still finds the directory held
    assert not (tmp_path / LOCK_NAME).exists()


def test_a_start_that_comes_after_a_deletion_has_the_lock(tmp_path, quick_looks):
    with RunLock(tmp_path) as first:
        (tmp_path / LOCK_NAME).unlink()
        with RunLock(tmp_path) as second:
            assert (first.lost, second.lost) == (Loss.LOCK, Loss.NONE)
            first.delete()
            assert second.lost is Loss.NONE


@pytest.mark.parametrize("is_renamed", [True, False])
def test_a_run_directory_that_vanished_is_no_other_run(tmp_path, is_renamed, quick_looks):
    directory = tmp_path / "run"
    directory.mkdir()
    with RunLock(directory) as lock:
        if is_renamed:
            directory.rename(tmp_path / "elsewhere")
        else:
            shutil.rmtree(directory)
        assert lock.lost is Loss.DIRECTORY
        assert "removed or renamed" in lock.lost.words and not directory.exists()


def test_a_name_that_is_missing_for_a_moment_is_no_loss(tmp_path, monkeypatch):
    directory = tmp_path / "run"
    directory.mkdir()
    with RunLock(directory) as lock:
        directory.rename(tmp_path / "elsewhere")
        monkeypatch.setattr(time, "sleep", lambda seconds: seconds and (tmp_path / "elsewhere").rename(directory))
        assert lock.lost is Loss.NONE


def test_a_rank_without_the_lock_loses_none(tmp_path):
    assert RunLock(tmp_path).lost is Loss.NONE and os.listdir(tmp_path) == []


def test_a_lock_that_is_given_back_is_not_made_anew(tmp_path, quick_looks):
    with RunLock(tmp_path) as lock:
        lock.delete()
        assert lock.lost is Loss.NONE and not (tmp_path / LOCK_NAME).exists()


def test_of_many_that_take_over_at_once_one_succeeds(tmp_path, elsewhere):
    starters = 6
    for round_number in range(20):
        directory = tmp_path / str(round_number)
        directory.mkdir()
        write(directory, elsewhere, age_seconds=1000)
        barrier, everybody_tried = threading.Barrier(starters), threading.Barrier(starters)
        outcomes = []

        def start(directory=directory, barrier=barrier, everybody_tried=everybody_tried, outcomes=outcomes):
            lock = RunLock(directory)
            barrier.wait(SECONDS)
            try:
                with lock:
                    everybody_tried.wait(SECONDS)
                    outcomes.append("lost" if lock.lost else "held")
            except InputError:
                everybody_tried.wait(SECONDS)
                outcomes.append("refused")

        threads = [threading.Thread(target=start) for _ in range(starters)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
        assert sorted(outcomes) == ["held"] + ["refused"] * (starters - 1)
        assert os.listdir(directory) == []


def test_a_directory_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be made, read or replaced"), RunLock(tmp_path / "missing"):
        pass


def test_nothing_is_left_when_the_disk_is_full(tmp_path, monkeypatch):
    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Holder, "to_json", full)
    with pytest.raises(InputError, match="No space left on device"), RunLock(tmp_path):
        pass
    assert os.listdir(tmp_path) == []
