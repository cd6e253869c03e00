"""A rank that raises, dies or hangs ends the whole job within a bounded time, and says why."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.distributed.ranks import free_port
from tests.integration.conftest import REPOSITORY, settings

FAILING_RANK = 1
SECONDS_TO_START = 120
# A launcher that ends stopped ranks gives each of them 30 seconds.
SECONDS_TO_END = 90
HANG_SECONDS = 18
# Imported by every Python that starts with its folder on PYTHONPATH: lets a test reach into a rank in mid-run.
SITE_CUSTOMIZE = """
import os, signal, time

def fail(number, frame):
    raise RuntimeError("made to fail by a test")

def sleep(number, frame):
    while True:
        time.sleep(1)

if os.environ.get("RANK") == "1":
    signal.signal(signal.SIGALRM, fail)
    signal.signal(signal.SIGUSR2, sleep)
"""


def command_of(launcher):
    """The launcher's command for two ranks."""
    programs = Path(sys.executable).parent
    if launcher == "deepspeed":
        return [str(programs / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    return [str(programs / "torchrun"), "--nproc-per-node", "2", "--master-port", str(free_port())]


class Job:
    """A run of two ranks that would take hours."""

    def __init__(self, process, output, console):
        self.process = process
        self.output = output
        self._console = console

    @property
    def console(self):
        return self._console.read_text(errors="replace")

    @property
    def status(self):
        return json.loads((self.output / "status.json").read_text())

    def log(self, rank):
        return (self.output / "logs" / f"rank-{rank:04d}.log").read_text()

    def rank(self, number):
        """Process of a rank."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            if "launcher/train.py" in process.cmdline() and process.environ().get("RANK") == str(number):
                if process.parent().environ().get("RANK") is None:
                    return process
        raise AssertionError(f"no rank {number}:\n{self.console}")

    def wait_for_steps(self):
        """Until a few steps are done."""
        metrics = self.output / "metrics.jsonl"
        deadline = time.monotonic() + SECONDS_TO_START
        while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
            assert self.process.poll() is None and time.monotonic() < deadline, self.console
            time.sleep(0.2)

    def end(self):
        """Exit code of the launcher and the seconds until it came."""
        started = time.monotonic()
        try:
            code = self.process.wait(timeout=SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end within {SECONDS_TO_END} s:\n{self.console}") from None
        return code, time.monotonic() - started


@contextmanager
def started(launcher, data, directory):
    """A job in mid-run; whatever is left of it is ended."""
    (directory / "site").mkdir()
    (directory / "site" / "sitecustomize.py").write_text(SITE_CUSTOMIZE)
    output, console = directory / "out", directory / "console.txt"
    more = ("train.max_steps=100000", "evaluation.interval=1000000", "ebft.rl_coef=0", "ebft.ce_coef=1")
    more += (f"train.step_timeout_minutes={HANG_SECONDS / 60}",)
    arguments = ["launcher/train.py", "--config", "configs/tiny_cpu.yaml", *settings(data, output, *more)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(directory / "site"),
    }
    with console.open("wb") as stream:
        process = subprocess.Popen(
            [*command_of(launcher), *arguments], cwd=REPOSITORY, env=environment, stdout=stream, stderr=stream
        )
    job = Job(process, output, console)
    everyone = []
    try:
        job.wait_for_steps()
        everyone = psutil.Process(process.pid).children(recursive=True)
        yield job
        assert not psutil.wait_procs(everyone, timeout=10)[1], "ranks outlive their launcher"
    finally:
        if process.poll() is None:
            everyone += psutil.Process(process.pid).children(recursive=True)
        for leftover in (*everyone, process):
            try:
                leftover.kill()
            except psutil.NoSuchProcess:
                pass
        process.wait(timeout=10)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_rank_that_raises(launcher, data, tmp_path):
    with started(launcher, data, tmp_path) as job:
        job.rank(FAILING_RANK).send_signal(signal.SIGALRM)
        code, seconds = job.end()
    assert code == 1 and seconds < 60
    assert job.status["state"] == "failed" and job.status["exit_code"] == 1 and job.status["step"] >= 2
    # The rank that failed says everything, before the others, who only lost it, say that they did.
    assert "RuntimeError: made to fail by a test" in job.log(FAILING_RANK)
    first = job.console.index("Traceback (most recent call last)")
    assert "RuntimeError: made to fail by a test" in job.console[first:]
    assert job.console.count("Traceback (most recent call last)") == 1 or launcher == "torchrun"
    assert "another rank failed with exit code 1" not in job.console[:first]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_rank_that_is_killed(launcher, data, tmp_path):
    with started(launcher, data, tmp_path) as job:
        job.rank(FAILING_RANK).kill()
        code, seconds = job.end()
    assert code not in (0, 3) and seconds < 60
    # The launcher may end the other rank before that could write anything down.
    status = job.output / "status.json"
    assert not status.exists() or job.status["exit_code"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_rank_that_stands_still(launcher, data, tmp_path):
    """Stopped by a signal, it cannot even report; the other one waits in a collective and must not do so for ever."""
    with started(launcher, data, tmp_path) as job:
        stopped = job.rank(FAILING_RANK)
        stopped.suspend()
        code, seconds = job.end()
    assert code == (3 if launcher == "deepspeed" else 1)
    assert HANG_SECONDS < seconds
    assert job.status["state"] == "failed" and job.status["exit_code"] == 3
    for text in (job.console, job.log(0)):
        assert "watchdog of rank 0: nothing has ended for 18 s; the last thing that ended: " in text
        assert "train/loop.py" in text, "the stack of the main thread, in the step or in what follows it"


@pytest.mark.slow
def test_a_rank_that_sleeps_for_ever(data, tmp_path):
    """Both ranks report: one says that it sleeps, the other that it waits for it."""
    with started("deepspeed", data, tmp_path) as job:
        job.rank(FAILING_RANK).send_signal(signal.SIGUSR2)
        code, seconds = job.end()
    assert code == 3 and HANG_SECONDS < seconds < HANG_SECONDS + 30
    assert job.status["exit_code"] == 3
    assert "in sleep" in job.log(FAILING_RANK) and "in sleep" not in job.log(0)
    assert all("Stacks of all threads" in job.log(rank) and "in train_step" in job.log(rank) for rank in range(2))
