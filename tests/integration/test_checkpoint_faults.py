"""Kills, signals, full disks and damage: a run that goes on afterwards is the run that nothing had happened to."""

import os
import random
import shutil
import signal
import sys

import psutil
import pytest

from ebft_mega.checkpoint.folders import complete_folders
from ebft_mega.checkpoint.manifest import file_problems, read_manifest
from tests.distributed.runs import checkpoint
from tests.integration.jobs import Site, assert_same_outcome, finish, forked, launched
from tests.integration.rank_with_faults import PHASES, STAGES

STEPS = 6
EVERY = 2
LENGTH = (f"train.max_steps={STEPS}", f"checkpoint.interval={EVERY}")
ORDER = tuple(STAGES)
CHAIN_STEPS = EVERY * (len(ORDER) + 1)
CHAIN = (f"train.max_steps={CHAIN_STEPS}", f"checkpoint.interval={EVERY}", "checkpoint.keep_last=2")
BEFORE_THE_RENAME = ORDER[: ORDER.index("renamed")]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Data and a configuration."""
    return Site.made_in(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def clean(site):
    """A run that nothing happens to, with all of its checkpoints."""
    output = site.directory / "clean"
    finish(site, output, *LENGTH)
    return output


def folders(output):
    """Names of a run's checkpoints, and whatever lies beside them."""
    return sorted(path.name for path in (output / "checkpoints").iterdir())


def assert_whole(folder):
    manifest = read_manifest(folder)
    assert file_problems(folder, manifest, manifest.files) == []


def kill_at(site, output, stage, settings, last):
    """Start, kill all ranks at a stage of the first checkpoint that is written, and look at what is left.

    Args:
        last: steps of the newest complete checkpoint before.
    Returns:
        Steps of the one after.
    """
    with forked(site, output, *settings, stage=stage) as job:
        job.wait_until_holding(STAGES[stage][2][0])
        job.kill()
        if last:
            assert f"going on after step {last} from" in job.console
    last += 0 if stage in BEFORE_THE_RENAME else EVERY
    root = output / "checkpoints"
    assert [folder.name for folder in complete_folders(root)][:1] == ([f"step-{last:08d}"] if last else [])
    for folder in complete_folders(root):
        assert_whole(folder)
    return last


def test_all_ranks_are_killed_at_every_stage_of_a_save(site):
    clean, output = site.directory / "clean-chain", site.directory / "chain"
    finish(site, clean, *CHAIN)
    last = 0
    for stage in ORDER:
        last = kill_at(site, output, stage, CHAIN, last)
    console = finish(site, output, *CHAIN)
    assert f"going on after step {last} from" in console
    assert folders(output) == folders(clean) == sorted(["latest", *(f"step-{CHAIN_STEPS - n:08d}" for n in (0, EVERY))])
    assert_same_outcome(clean, output, CHAIN_STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("stage", STAGES)
def test_all_ranks_are_killed_during_a_save_of_any_step(site, clean, tmp_path, stage, seed):
    output = tmp_path / "out"
    choice = random.Random(f"{stage} {seed}")
    settings = (*LENGTH[:1], f"checkpoint.interval={choice.randrange(1, 4)}")
