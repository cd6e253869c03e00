"""A rank that is killed for memory is said to be so, with its phase and what the plan needs for that."""

import json
import mmap
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from ebft_mega.runtime import witness_process
from ebft_mega.runtime.memory_counters import changes, oom_kills
from ebft_mega.runtime.witness import Witness, phase, watched_by

NEEDS = {"learn": "the plan needs 12.3 GB for it"}
RANK = """
import sys, time
from pathlib import Path
from ebft_mega.runtime.witness import Witness, phase, watched_by
directory = Path(sys.argv[1])
needs = {"learn": "the plan needs 12.3 GB for it"}
with watched_by(Witness(3, directory / "rank.log", directory / "status.json", needs)):
    with phase("learn"):
        print("ready", flush=True)
        time.sleep(60 if sys.argv[2] == "stay" else 0)
print("left", flush=True)
time.sleep(60)
"""


def write_groups(root, own, counts, version=2):
    """Files of a control group and those above it, and of a process in it."""
    (root / "proc" / "self").mkdir(parents=True, exist_ok=True)
    line = f"0::/{own}" if version == 2 else f"4:cpu,memory:/{own}\n3:cpuset:/"
    (root / "proc" / "self" / "cgroup").write_text(f"{line}\n")
    name = "memory.events" if version == 2 else "memory.oom_control"
    base = root / "groups" / ("memory" if version == 1 else "")
    for folder, count in counts.items():
        (base / folder).mkdir(parents=True, exist_ok=True)
        (base / folder / name).write_text(f"low 0\noom 7\noom_kill {count}\noom_group_kill 0\n")
    return root / "groups", root / "proc" / "self"


@pytest.mark.parametrize("version", [1, 2])
def test_counters_of_a_group_and_those_above(tmp_path, version):
    places = write_groups(tmp_path, "job/step", {"job/step": 1, "job": 4, "": 9}, version)
    before = oom_kills(*places)
    assert list(before.values()) == [1, 4, 9]
    assert changes(before, oom_kills(*places)) == ""
    write_groups(tmp_path, "job/step", {"job": 5, "": 10}, version)
    said = changes(before, oom_kills(*places))
    assert said.startswith("oom_kill in ") and "/job/memory." in said and said.endswith("went from 4 to 5")


def test_a_container_sees_its_own_group_at_the_root(tmp_path):
    assert list(oom_kills(*write_groups(tmp_path, "not/there", {"": 2})).values()) == [2]


def test_without_groups_the_machine_counts(tmp_path):
    places = write_groups(tmp_path, "x", {})
    assert oom_kills(*places) == {}
    (tmp_path / "proc" / "vmstat").write_text("nr_free_pages 3\noom_kill 8\n")
    assert list(oom_kills(*places).values()) == [8]


@pytest.fixture
def rank(tmp_path):
    """Start a process that has a witness; whatever is left of it ends with the test."""
    started = []

    def start(how):
        command = [sys.executable, "-c", RANK, str(tmp_path), how]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=(tmp_path / "err").open("w"), text=True)
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process, psutil.Process(process.pid).children()[0]

    yield start
    for process in started:
        process.kill()
        process.wait(10)
        process.stdout.close()


def test_a_killed_rank_leaves_a_line_and_no_process(rank, tmp_path):
    process, witness = rank("stay")
    assert witness.memory_info().rss < 30 << 20
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        witness.send_signal(number)  # of a terminal, of a launcher
    process.kill()
    assert psutil.wait_procs([witness], timeout=10)[1] == []
    (line,) = (tmp_path / "err").read_text().splitlines()
    assert line.startswith(f"rank 3 (process {process.pid}) ") and "in phase learn" in line
    assert line.endswith("; the plan needs 12.3 GB for it") and line in (tmp_path / "rank.log").read_text()


def test_a_rank_that_leaves_has_no_testimony(rank, tmp_path):
    process, witness = rank("leave")
    assert process.stdout.readline() == "left\n"
    process.kill()
    assert psutil.wait_procs([witness], timeout=10)[1] == []
    assert (tmp_path / "err").read_text() == "" and not (tmp_path / "rank.log").exists()


@pytest.fixture
def shared(tmp_path):
    """What a rank in phase `learn` has told its witness."""
    facts = {"rank": 3, "process": 77, "needs": NEEDS}
    facts |= {"log": str(tmp_path / "rank.log"), "status": str(tmp_path / "status.json")}
    page, text = mmap.mmap(-1, witness_process.SHARED_BYTES), json.dumps(facts).encode()
    page[64 : 64 + len(text)] = text
    page[1:6] = b"learn"
    page[0] = witness_process.WATCHED
    return page


@pytest.mark.parametrize("earlier", [None, '{"state": "failed", "exit_code": 1}'])
def test_killed_for_memory(shared, tmp_path, monkeypatch, capfd, earlier):
    (tmp_path / "metrics.jsonl").write_text('{"step": 6}\n{"step": 7}\n')
    if earlier:
        (tmp_path / "status.json").write_text(earlier)
    counts = iter([{"/group/memory.events": 0}, {"/group/memory.events": 1}])
    monkeypatch.setattr(witness_process, "oom_kills", lambda: next(counts))
    witness_process.watch(shared, -1)
    assert capfd.readouterr().err == (
        "rank 3 (process 77) was killed for lack of memory in phase learn: oom_kill in /group/memory.events went from "
        "0 to 1; the plan needs 12.3 GB for it\n"
    )
    outcome = {"state": "failed", "exit_code": 137, "checkpoint": None, "step": 7}
    assert json.loads((tmp_path / "status.json").read_text()) == (json.loads(earlier) if earlier else outcome)


def test_phases_nest_and_one_that_raises_stays(tmp_path):
    witness = Witness(0, tmp_path / "log", tmp_path / "status.json", NEEDS)
    with watched_by(witness):
        with phase("rollout"):
            with phase("update"):
                assert witness.phase == "update"
            assert witness.phase == "rollout"
        assert witness.phase == ""
        with pytest.raises(MemoryError) as raised, phase("learn"):
            raise MemoryError
        words = "memory ran out in phase learn: MemoryError; the plan needs 12.3 GB for it"
        assert witness.words_for(raised.value) == words
        error = RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried\nmore"
        )
        assert "can't allocate memory" in witness.words_for(error) and "more" not in witness.words_for(error)
        assert witness.words_for(RuntimeError("shape mismatch")) == ""


def test_a_phase_costs_next_to_nothing(tmp_path):
    with watched_by(Witness(0, tmp_path / "log", tmp_path / "status.json", NEEDS)):
        started = time.process_time()
        for _ in range(1000):
            with phase("learn"):
                pass
    assert time.process_time() - started < 0.2


def test_no_room_for_a_witness(tmp_path, monkeypatch):
    def no_room(*arguments, **options):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(subprocess, "Popen", no_room)
    with watched_by(Witness(0, tmp_path / "log", tmp_path / "status.json", NEEDS)), phase("learn"):
        assert os.getpid()
