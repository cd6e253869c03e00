"""The batch scripts: submitted in order, clean, each task one run, and requeued where the time limit comes near."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ebft_mega.apps.experiment.running.job_pool import JobFailed
from ebft_mega.apps.experiment.running.slurm_arrays import write_arrays
from ebft_mega.errors import InputProblems


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """`sbatch` and `scontrol` that note what they are called with."""
    folder = tmp_path / "programs"
    folder.mkdir()
    answers = {"sbatch": "wc -l < {notes} | tr -d ' '", "scontrol": "true"}
    for name, answer in answers.items():
        notes = tmp_path / f"{name}.notes"
        notes.touch()
        script = f'#!/bin/sh\nprintf "%s\\n" "$*" >> {notes}\n{answer.format(notes=notes)}\n'
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return lambda name: (tmp_path / f"{name}.notes").read_text().splitlines()


def test_stages_are_submitted_in_order_and_are_as_wide_as_they_have_runs(small, programs):
    small.run(until="report", sbatch_options=("--partition=a b", "--time=10"), submits=True)
    jobs = programs("sbatch")
    names = [Path(job.split()[-1]).stem for job in jobs]
    assert names == ["prepare", "train-1", "tune", "train", "evaluate", "report"]
    assert "afterok" not in jobs[0] and all("--partition=a b --time=10" in job for job in jobs)
    assert [f"afterok:{number}" in job for number, job in enumerate(jobs)] == [False, *[True] * 5]
    folder = small.output / "slurm"
    widths = [(folder / f"{name}.sbatch").read_text().split("--array=0-")[1].split()[0] for name in names]
    assert widths == ["0", "0", "1", "3", "4", "0"]
    shellcheck = Path(sys.executable).with_name("shellcheck")
    scripts = sorted(map(str, (*folder.glob("*.sbatch"), folder / "submit.sh")))
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    assert small.started == []


def test_every_task_is_one_run(small):
    for stage, count in (("prepare", 1), ("train-1", 1), ("tune", 2), ("train", 4), ("evaluate", 5)):
        for task in reversed(range(count)):
            small.run(stage=stage, task=task)
            assert len(small.started) == {"prepare": 0, "train-1": 1, "train": 1}.get(stage, 2)
    with pytest.raises(InputProblems, match="a number from 0 to 3"):
        small.run(stage="train", task=4)


def test_a_task_waits_for_what_it_needs(small):
    with pytest.raises(InputProblems, match="chosen for ce, which is not tuned yet"):
        small.run(stage="train", task=0)
    assert small.started == []


def test_a_run_that_was_stopped_on_request_ends_a_task_with_its_own_code(small):
    status = '{"state": "stopped", "exit_code": 75, "checkpoint": null, "step": 1}'
    small.train = lambda setup, config, overrides: [
        *("sh", "-c", f"echo {shlex.quote(status)} > {small.output}/runs/warm/seed-5/status.json; exit 1")
    ]
    with pytest.raises(JobFailed, match="the same command resumes it") as caught:
        small.run(stage="train-1", task=0)
    assert caught.value.exit_code == 75


TOOL = """
import signal, subprocess, sys
child = [sys.executable, "-c", '''
import signal, sys
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
print("waiting", flush=True)
signal.pause()
''']
sys.exit(subprocess.run(child).returncode)
"""


def test_the_time_limit_comes_near(small, programs):
    """USR1 reaches the run and not the tool, and the task is requeued."""
    small.run(until="prepare")
    experiment = declared(small)
    write_arrays(experiment, experiment.stages[:1], [sys.executable, "-c", TOOL], ())
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_JOB_ID": "12"}
    script = small.output / "slurm" / "prepare.sbatch"
    process = subprocess.Popen(["bash", str(script)], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "waiting\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=30) == 75
    assert programs("scontrol") == ["requeue 12_0"]


def declared(small):
    from ebft_mega.apps.experiment.running.program import ExperimentOptions, read_setup
    from ebft_mega.apps.experiment.runs.declared_experiment import DeclaredExperiment

    return DeclaredExperiment(read_setup(ExperimentOptions(small.folder / "spec.yaml")), small)
