"""Kills, signals, full disks and damage: a run that goes on afterwards is the run that nothing had happened to."""

import os
import pickle
import random
import shutil
import signal

import psutil
import pytest

from ebft_mega.checkpoint.folders import complete_folders
from ebft_mega.checkpoint.manifest import file_problems, read_manifest
from ebft_mega.data.build import build_dataset
from ebft_mega.data.tokenizer import load_tokenizer
from ebft_mega.data.tokenizer_training import train_tokenizer
from tests.distributed.runs import checkpoint
from tests.integration.jobs import RANKS, Site, assert_same_outcome, finish, forked, launched
from tests.integration.rank_with_faults import PHASES, STAGES

STAGES_BEFORE_IT_COUNTS = tuple(STAGES)[: tuple(STAGES).index("renamed")]
EVERY = 2
# Each stage after the rename leaves one more checkpoint.
STEPS = EVERY * (len(STAGES) - len(STAGES_BEFORE_IT_COUNTS) + 1)
LENGTH = (f"train.max_steps={STEPS}", f"checkpoint.interval={EVERY}", "checkpoint.keep_last=2")
ON_REQUEST_ONLY = (f"train.max_steps={STEPS}", "checkpoint.interval=1000")  # and at the end
KEPT = ["latest", f"step-{STEPS - EVERY:08d}", f"step-{STEPS:08d}"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Data and a configuration."""
    return Site.made_in(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def clean(site):
    """A run that nothing happens to."""
    output = site.directory / "clean"
    finish(site, output, *LENGTH)
    assert entries(output) == KEPT
    return output


@pytest.fixture
def copy(clean, tmp_path):
    """The same, to be damaged: its last checkpoint and the one before."""
    return shutil.copytree(clean, tmp_path / "out")


def entries(output):
    """Names of a run's checkpoints, and of whatever lies beside them."""
    return sorted(path.name for path in (output / "checkpoints").iterdir())


def stopped_at(step):
    """What `status.json` says of a run that was asked to stop."""
    return {"state": "stopped", "exit_code": 75, "checkpoint": f"step-{step:08d}", "step": step}


def kill_all(site, output, settings, stage, last):
    """Start, kill all ranks at a stage of the first checkpoint that is written, and look at what is left.

    Args:
        last: steps of the newest complete checkpoint before.
    Returns:
        Steps of the one after.
    """
    with forked(site, output, *settings, stage=stage) as job:
        job.wait_until_holding(STAGES[stage][2][0])
        job.kill()
        assert not last or f"going on after step {last} from" in job.console
    interval = int(settings[1].split("=")[1])
    last += 0 if stage in STAGES_BEFORE_IT_COUNTS else interval
    whole = complete_folders(output / "checkpoints")
    assert [folder.name for folder in whole][:1] == ([f"step-{last:08d}"] if last else [])
    for folder in whole:
        manifest = read_manifest(folder)
        assert file_problems(folder, manifest, manifest.files) == []
    return last


def test_all_ranks_are_killed_at_every_stage_of_a_save(site, clean, tmp_path):
    last = 0
    for stage in STAGES:
        last = kill_all(site, tmp_path / "out", LENGTH, stage, last)
    console = finish(site, tmp_path / "out", *LENGTH)
    assert f"going on after step {last} from" in console
    assert entries(tmp_path / "out") == KEPT
    assert_same_outcome(clean, tmp_path / "out", STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_all_ranks_are_killed_in_another_order(site, clean, tmp_path, seed):
    choice = random.Random(seed)
    order = choice.sample(tuple(STAGES), len(STAGES))
    order.sort(key=lambda stage: stage == "old one half deleted")  # last: there has to be an old one
    settings = (LENGTH[0], f"checkpoint.interval={choice.choice((1, EVERY))}", "checkpoint.keep_last=1")
    last = 0
    for stage in order:
        last = kill_all(site, tmp_path / "out", settings, stage, last)
    finish(site, tmp_path / "out", *settings)
    assert_same_outcome(clean, tmp_path / "out", STEPS)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_one_rank_is_killed(site, clean, tmp_path, seed):
    choice = random.Random(seed)
    phase = choice.choice(tuple(PHASES))
    call = choice.randint(2, 3 if phase == "evaluation" else STEPS)
    victim = choice.randrange(RANKS)
    output = tmp_path / "out"
    with forked(site, output, *LENGTH, phase=phase, call=call) as job:
        job.wait_until_holding(*range(RANKS))
        job.rank(victim).kill()
        job.go()
        codes = job.end()
        assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 1, (phase, call, codes, job.console)
        assert job.status["state"] == "failed" and job.status["exit_code"] == 1
    finish(site, output, *LENGTH)
    assert_same_outcome(clean, output, STEPS)


# What is done to a job, and the code that the `deepspeed` command then ends with.
WISHES = {
    "SIGTERM to a rank": (lambda job: job.rank(1).terminate(), 75),
    "SIGUSR1 to a rank": (lambda job: job.rank(1).send_signal(signal.SIGUSR1), 75),
    "SIGTERM to launch.py": (lambda job: job.launch_py.terminate(), 1),
    "SIGTERM to deepspeed": (lambda job: (job.processes[0].terminate(), job.processes[0].wait()), -signal.SIGTERM),
    "SIGTERM to the process group": (lambda job: os.killpg(job.processes[0].pid, signal.SIGTERM), -signal.SIGTERM),
    "the file STOP": (lambda job: (job.output / "STOP").touch(), 75),
    "the time limit": (lambda job: None, 75),
}
# When it happens: the phase, for which time it is entered, and the steps that are done when the run stops.
MOMENTS = {"rollout": (3, 3), "learning": (3, 3), "evaluation": (2, 4)}
TIME_LIMIT = ("train.max_run_minutes=30",)


def stop_and_go_on(site, clean, start, wish, phase, expected_codes, **options):
    """Ask a run to stop, look at what it leaves, and let it go on."""
    call, step = MOMENTS[phase]
    output = start.output
    with start(phase=phase, call=call, clock=3600.0 if wish == "the time limit" else 0.0) as job:
        job.wait_until_holding(*range(RANKS))
        WISHES[wish][0](job)
        job.go()
        assert job.end() == expected_codes, job.console
    assert job.status == stopped_at(step), job.console
    assert entries(output) == ["latest", f"step-{step:08d}"]
    assert not (output / "STOP").exists() and not (output / "run.lock").exists()
    console = finish(site, output, *ON_REQUEST_ONLY)
    assert f"going on after step {step} from" in console
    assert_same_outcome(clean, output, STEPS)
