"""Rows of the table of signals in docs/running.md: the end of a run, two interrupts, readers, `nohup`, `torchrun`."""

import os
import signal
import time

import psutil
import pytest

from tests.integration.jobs import RANKS, SECONDS_TO_END, Site, assert_same_outcome, finish, forked, launched

pytestmark = pytest.mark.slow
STEPS = 4
LENGTH = (f"train.max_steps={STEPS}", "checkpoint.interval=2")
ALL_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
DONE = {"state": "done", "exit_code": 0, "checkpoint": f"step-{STEPS:08d}", "step": STEPS}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Data and a configuration."""
    return Site.made_in(tmp_path_factory.mktemp("stops"))


@pytest.fixture(scope="module")
def clean(site):
    """A run that nothing happens to."""
    output = site.directory / "clean"
    finish(site, output, *LENGTH)
    return output


def stopped_at(step):
    """What `status.json` says of a run that was asked to stop."""
    return {"state": "stopped", "exit_code": 75, "checkpoint": f"step-{step:08d}" if step else None, "step": step}


def interrupt_twice(process):
    """Ctrl-C, and again."""
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)


def test_a_run_that_ends_finishes_whatever_its_ranks_are_sent(site, clean, tmp_path):
    with forked(site, tmp_path / "out", *LENGTH, phase="end", call=1) as job:
        job.wait_until_holding(*range(RANKS))
        for number in ALL_SIGNALS:
            for rank in range(RANKS):
                job.rank(rank).send_signal(number)
        (job.output / "STOP").touch()
        job.go()
        assert job.end() == [0] * RANKS, job.console
    assert "Traceback" not in job.console
    assert_same_outcome(clean, tmp_path / "out", STEPS)


# Launcher, what is done to the job, the moment, and the code that the launcher then ends with. The ranks end with 75,
# or, at the end, with 0.
CASES = {
    "Ctrl-C": ("deepspeed", lambda job: os.killpg(job.processes[0].pid, signal.SIGINT), "learning", -2),
    "Ctrl-C at the end": ("deepspeed", lambda job: os.killpg(job.processes[0].pid, signal.SIGINT), "end", -2),
    "a terminal that closes at the end": (
        "deepspeed",
        lambda job: os.killpg(job.processes[0].pid, signal.SIGHUP),
        "end",
        -1,
    ),
    "TERM to launch.py at the end": ("deepspeed", lambda job: job.launch_py.terminate(), "end", 1),
    "INT to launch.py": ("deepspeed", lambda job: job.launch_py.send_signal(signal.SIGINT), "learning", 1),
    "KILL to launch.py": ("deepspeed", lambda job: job.launch_py.kill(), "learning", 0),
    "KILL to deepspeed": ("deepspeed", lambda job: job.processes[0].kill(), "learning", -9),
    "TERM to torchrun at the start": ("torchrun", lambda job: job.processes[0].terminate(), "start", 1),
    "INT to torchrun": ("torchrun", lambda job: job.processes[0].send_signal(signal.SIGINT), "learning", 1),
    "KILL to torchrun": ("torchrun", lambda job: job.processes[0].kill(), "learning", -9),
    "HUP to torchrun at the end": ("torchrun", lambda job: job.processes[0].send_signal(signal.SIGHUP), "end", 1),
    "TERM to a rank of torchrun": ("torchrun", lambda job: job.rank(1).terminate(), "learning", 1),
}


@pytest.mark.parametrize("name", CASES)
def test_signals_to_launchers(site, clean, tmp_path, name):
    launcher, act, phase, code = CASES[name]
    call, step = {"start": (1, 0), "learning": (3, 3), "end": (1, STEPS)}[phase]
    output = tmp_path / "out"
    with launched(site, output, *LENGTH, launcher=launcher, phase=phase, call=call) as job:
        job.wait_until_holding(*range(RANKS))
        act(job)
        time.sleep(0.5)
        job.go()
        assert job.end() == [code], job.console
    assert job.status == (DONE if phase == "end" else stopped_at(step)), job.console
    if phase != "end":
        finish(site, output, *LENGTH)
    assert_same_outcome(clean, output, STEPS)


def test_ctrl_c_in_a_step_of_more_than_30_seconds_loses_it_and_the_next_start_resumes(site, clean, tmp_path):
    output = tmp_path / "out"
    with launched(site, output, *LENGTH, phase="learning", call=4) as job:
        job.wait_until_holding(*range(RANKS))
        first = job.rank(0)
        os.killpg(job.processes[0].pid, signal.SIGINT)
        assert job.processes[0].wait(5) == -2 and "KeyboardInterrupt" in job.console  # long before its ranks end
        time.sleep(25)
        assert first.status() != psutil.STATUS_ZOMBIE
        time.sleep(10)
        assert first.status() == psutil.STATUS_ZOMBIE, job.console  # killed; launch.py waits for the next one
        job.go()
        job.end()
    assert f"the safe way to stop: touch {output}/STOP" in job.console
    assert job.status["state"] == "failed" and job.status["checkpoint"] == "step-00000002", job.console
    finish(site, output, *LENGTH)
    assert_same_outcome(clean, output, STEPS)


@pytest.mark.parametrize(("phase", "call"), [("learning", 3), ("end", 1)])
def test_two_interrupts_end_a_rank_at_once_and_the_next_start_resumes(site, clean, tmp_path, phase, call):
    output = tmp_path / "out"
    with forked(site, output, *LENGTH, phase=phase, call=call) as job:
        job.wait_until_holding(*range(RANKS))
        interrupt_twice(job.rank(0))
        job.processes[0].join(5)
        assert job.processes[0].exitcode == 130, job.console
        job.go()
        assert job.end() == [130, 1], job.console
    assert not (output / "hf").exists()
    finish(site, output, *LENGTH)
    assert_same_outcome(clean, output, STEPS)


def test_a_reader_that_is_killed_fails_its_rank(site, tmp_path):
    output = tmp_path / "out"
    settings = (f"train.max_steps={3 * STEPS}", "checkpoint.interval=2")  # some batches were read ahead
    with forked(site, output, *settings, "data.workers=1", phase="learning", call=2) as job:
        job.wait_until_holding(*range(RANKS))
        command = job.rank(1).cmdline()
        readers = [child for child in job.rank(1).children() if child.cmdline() == command]
        assert len(readers) == 1
        readers[0].kill()
        job.go()
        assert job.end() == [1] * RANKS, job.console
    assert job.status["state"] == "failed" and job.status["exit_code"] == 1, job.console
    finish(site, output, *settings)


def test_a_job_under_nohup_outlives_its_terminal(site, tmp_path):
    settings = ("train.max_steps=1000", "checkpoint.interval=1000")
    with launched(site, tmp_path / "out", *settings, ignored=(signal.SIGHUP,), phase="learning", call=2) as job:
        job.wait_until_holding(*range(RANKS))
        os.killpg(job.processes[0].pid, signal.SIGHUP)
        job.go()
        assert not psutil.wait_procs(job.everybody, timeout=3)[0], job.console
        os.killpg(job.processes[0].pid, signal.SIGTERM)
        job.processes[0].wait(SECONDS_TO_END)
        job.end()
    assert job.status["state"] == "stopped" and job.status["exit_code"] == 75, job.console
