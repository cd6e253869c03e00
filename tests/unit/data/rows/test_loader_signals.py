"""Worker processes of a loader leave the signals of a run to the rank, and still never outlive it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ebft_mega.data.builder import worker_pool
from ebft_mega.data.rows import loader

ROOT = Path(__file__).resolve().parents[4]
SECONDS = 60
PROGRAM = """
import multiprocessing, os, signal, sys
sys.path.insert(0, {root!r})
from tests.unit.data.rows.test_loader import small_dataset
from ebft_mega.data.rows.loader import BatchLoader
from ebft_mega.data.rows.stream import RowStream
noted = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: noted.append(number))
batches = iter(BatchLoader(RowStream.of(small_dataset(), 8, 0), 4, workers=2))
next(batches)
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
{body}
"""
CONTINUES = """
sys.stdin.readline()
for _ in range(20):  # more than was read ahead
    next(batches)
assert sorted(noted) == [signal.SIGUSR1, signal.SIGTERM], noted
batches.close()
print("children:", len(multiprocessing.active_children()), flush=True)
"""
ENDS_WITH_WORKERS = """
sys.stdin.readline()  # until the test knows the workers
children = multiprocessing.active_children()
for child in children:
    child.terminate()
for child in children:
    child.join(30)
    assert child.exitcode == 0, child.exitcode
"""
WAITS = "signal.pause()"


@pytest.fixture
def start():
    """Starts a program with a loader in a process group of its own; gives it and its workers."""
    started = []

    def start(body):
        program = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", PROGRAM.format(root=str(ROOT), body=body)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(program)
        workers = [psutil.Process(int(pid)) for pid in program.stdout.readline().split()]
        started.extend(workers)
        assert len(workers) == 2, program.communicate(timeout=SECONDS)
        return program, workers

    yield start
    for process in started:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            pass
    for process in started:
        if isinstance(process, subprocess.Popen):
            process.communicate(timeout=SECONDS)  # ends once nobody holds the pipes any more


def test_signals_to_the_whole_group_leave_the_workers_at_work(start):
    program, workers = start(CONTINUES)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        os.killpg(program.pid, number)
    # What `deepspeed.launcher.launch` does: each process of the tree by itself.
    for worker in workers:
        worker.terminate()
    output, errors = program.communicate("continue\n", timeout=SECONDS)
    assert (program.returncode, output) == (0, "children: 0\n"), errors
    assert not any(worker.is_running() for worker in workers)


def test_the_process_that_started_them_can_end_them(start):
    program, _ = start(ENDS_WITH_WORKERS)
    # Python's own exit ends them in the same way, and waits for ever for one that does not go.
    _, errors = program.communicate("end\n", timeout=SECONDS)
    assert program.returncode == 0, errors


def test_workers_whose_parent_was_killed_can_be_ended(start):
    program, workers = start(WAITS)
    program.kill()
    program.wait(SECONDS)
    for worker in workers:
        worker.terminate()
    # By themselves they look for their parent every few seconds.
    gone, alive = psutil.wait_procs(workers, timeout=3)
    assert len(gone) == 2 and not alive


@pytest.mark.slow  # a worker looks for its parent every five seconds
def test_workers_end_with_a_parent_that_was_killed_after_a_signal(start):
    program, workers = start(WAITS)
    os.killpg(program.pid, signal.SIGTERM)
    program.kill()
    program.wait(SECONDS)
    deadline = time.monotonic() + SECONDS
    assert not psutil.wait_procs(workers, timeout=deadline - time.monotonic())[1]


ORPHAN = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from ebft_mega.io import child_processes
child_processes.PARENT_CHECK_SECONDS = 0.1
signal.pthread_sigmask(signal.SIG_BLOCK, child_processes.STOP_SIGNALS)
rank = os.getpid()
if os.fork() == 0:
    while os.getppid() == rank:
        time.sleep(0.01)
    child_processes.obey_the_parent_only(rank)
    time.sleep({seconds})
    print("still there", flush=True)
    os._exit(1)
print("forked", flush=True)
os.kill(rank, signal.SIGKILL)
"""


def test_a_worker_that_is_still_starting_when_its_parent_is_killed_ends():
    command = [sys.executable, "-W", "ignore", "-c", ORPHAN.format(root=str(ROOT), seconds=SECONDS)]
    # The output ends when the worker has ended, too.
    answer = subprocess.run(command, capture_output=True, text=True, timeout=2 * SECONDS)
    assert (answer.returncode, answer.stdout) == (-signal.SIGKILL, "forked\n"), answer.stderr


@pytest.mark.parametrize(
    ("module", "start"),
    [
        (loader, lambda: loader._obey_the_rank_only(7, 0)),
        (worker_pool, lambda: worker_pool._start_worker(7, None, None, None)),
    ],
)
def test_workers_take_the_process_for_their_parent_that_started_them(monkeypatch, module, start):
    """Not the one that they find themselves: it may be whatever has adopted them."""
    parents = []
    monkeypatch.setattr(module, "obey_the_parent_only", parents.append)
    start()
    assert parents == [7]
