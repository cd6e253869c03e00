"""`--fresh`: everything is set aside once, by renames, whatever a kill leaves half done."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from ebft_mega.errors import ConfigError
from ebft_mega.lifecycle import setting_aside
from ebft_mega.lifecycle.findings import UNFINISHED_MOVE, failure_of_last_start
from ebft_mega.lifecycle.setting_aside import Fresh, require_inputs_elsewhere, restore_model, take_directory
from ebft_mega.lifecycle.standing import Action
from tests.unit.lifecycle.run_directories import Site

FRESH = Fresh(is_asked=True)


@pytest.fixture
def site(inputs) -> Site:
    return Site(inputs)


def texts(directory):
    """Contents of all files below a directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def aside(site):
    """The folders that were set aside."""
    return sorted((site.output / "previous").iterdir())


def test_everything_but_lock_and_requests_is_set_aside_under_the_date(site):
    site.finish()
    before = texts(site.output)
    for name in ("run.lock", "STOP"):
        (site.output / name).write_text("of this start")
    standing = take_directory(*site.planned("seed=5"), FRESH)
    assert standing.action is Action.BEGIN
    (folder,) = aside(site)
    assert standing.notes == (f"what was in {site.output} is set aside in {folder}",)
    assert texts(folder) == before
    assert sorted(path.name for path in site.output.iterdir()) == ["STOP", "previous", "run.lock"]
    # A second time within the same second: another folder, and the first stays.
    site.finish("seed=5")
    take_directory(*site.planned(), FRESH)
    assert len(aside(site)) == 2 and texts(folder) == before
    assert "holds nothing to set aside" in take_directory(*site.planned(), FRESH).notes[0]


@pytest.mark.parametrize("renames", range(1, 9))
def test_kill_in_the_middle_loses_nothing_and_the_next_start_finishes(site, monkeypatch, renames):
    """Also one that is not asked to: a requeued job, for example."""
    site.finish()
    before = texts(site.output)
    done = []

    def rename(path, target):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(path)
        os.rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", rename)
        with suppress(KeyboardInterrupt):  # the last of the renames come through
            take_directory(*site.planned("seed=5"), FRESH)
    was_killed = (site.output / UNFINISHED_MOVE).exists()
    standing = take_directory(*site.planned("seed=5"), Fresh.of(True, (), {"SLURM_RESTART_COUNT": "1"}))
    assert standing.action is Action.BEGIN and not (site.output / UNFINISHED_MOVE).exists()
    assert was_killed == any("was killed while it set results aside" in note for note in standing.notes)
    (folder,) = aside(site)
    assert texts(folder) == before


@pytest.mark.parametrize(
    ("environment", "acts"),
    [
        ({}, True),
        ({"SLURM_RESTART_COUNT": "0", "TORCHELASTIC_RESTART_COUNT": "0"}, True),
        ({"SLURM_RESTART_COUNT": "1"}, False),
        ({"TORCHELASTIC_RESTART_COUNT": "2"}, False),
    ],
)
def test_it_acts_once(site, environment, acts):
    site.finish()
    fresh = Fresh.of(True, (), environment)
    assert fresh.acts == acts and not Fresh.of(False, (), environment).acts
    standing = take_directory(*site.planned(), fresh)
    assert standing.action is (Action.BEGIN if acts else Action.NOTHING)
    assert acts or "--fresh does nothing in a start that is not the first one of its job" in standing.notes[0]
    assert Fresh.of(False, (), environment).notes == ()


def test_what_the_job_itself_writes_and_reads_stays(site):
    """Logs of this Slurm job, what this process prints to, its configuration and its cache."""
    site.finish()
    logs = site.output / "logs"
    (site.output / "cache").mkdir()
    logs.mkdir()
    for name in ("logs/slurm-77-rank-0.out", "logs/slurm-7-rank-0.out", "logs/rank-0000.log", "cache/x", "my.yaml"):
        (site.output / name).write_text(name)
    keeps = (site.output / "my.yaml", site.output / "cache")
    program = (
        "import sys; from pathlib import Path; from ebft_mega.lifecycle.setting_aside import *\n"
        f"set_results_aside(Path({str(site.output)!r}), Fresh.of(True, [Path(p) for p in sys.argv[1:]]).keeps)"
    )
    with (site.output / "console.txt").open("w") as stream:
        root = str(Path(__file__).parents[3])
        environment = os.environ | {"SLURM_JOB_ID": "77", "PYTHONPATH": root}
        command = [sys.executable, "-c", program, *map(str, keeps)]
        subprocess.run(command, stdout=stream, env=environment, check=True, timeout=60)
    assert sorted(path.name for path in site.output.iterdir()) == [
        "cache",
        "console.txt",
        "logs",
        "my.yaml",
        "previous",
    ]
    assert [path.name for path in logs.iterdir()] == ["slurm-77-rank-0.out"]
    (folder,) = aside(site)
    assert sorted(path.name for path in (folder / "logs").iterdir()) == ["rank-0000.log", "slurm-7-rank-0.out"]


@pytest.mark.parametrize("key", ["model.init_from", "ebft.feature_model", "data.shards", "checkpoint.resume"])
def test_inputs_within_the_directory_are_refused(site, key):
    site.finish()
    before = texts(site.output)
    source = {"data.shards": "train", "checkpoint.resume": "run/hf"}.get(key, "model")
    inside = site.output / "hf" if key == "checkpoint.resume" else site.output / "inside"
    if key != "checkpoint.resume":
        shutil.copytree(site.inputs.root / source, inside)
    with pytest.raises(ConfigError, match=rf"{key}: found {inside}; expected a place outside"):
        require_inputs_elsewhere(site.planned(f"{key}={inside}")[0])
    assert before.items() <= texts(site.output).items()
    if key != "checkpoint.resume":  # what is set aside already does not move again
        (site.output / "previous").mkdir()
        inside.rename(site.output / "previous" / "inside")
        require_inputs_elsewhere(site.planned(f"{key}={site.output / 'previous' / 'inside'}")[0])


def test_directory_that_cannot_be_set_aside_is_refused(site):
    site.finish()
    (site.output / "previous").write_text("in the way")
    with pytest.raises(ConfigError, match="which cannot be set aside"):
        take_directory(*site.planned(), FRESH)
    assert (site.output / "hf").is_dir()


@pytest.mark.parametrize("replacing", [False, True])
def test_model_is_found_again_after_a_kill_between_its_two_renames(site, replacing):
    """The old one has left its name; the new one, if it is whole, is the better one."""
    site.finish()
    old, new = site.output / ".hf.00000001", site.output / ".hf.00000002"
    (site.output / "hf").rename(old)
    if replacing:
        site.export("train.max_steps=12", folder=new.name)
    else:
        shutil.copytree(old, new)
        (new / "model.safetensors").unlink()
    assert restore_model(site.output) and (site.output / "hf").is_dir()
    steps = 12 if replacing else 10
    assert site.standing(f"train.max_steps={steps}").action is Action.NOTHING
    assert not restore_model(site.output)


def test_start_says_that_it_only_writes_the_missing_model(site):
    site.finish(model=False)
    assert "its model is missing: it is written from " in take_directory(*site.planned(), Fresh()).notes[-1]


def test_the_date_has_no_letters_that_file_systems_refuse():
    assert ":" not in setting_aside.DATE_FORMAT and "/" not in setting_aside.DATE_FORMAT


@pytest.mark.parametrize(
    ("status", "note"),
    [
        ({"state": "failed", "exit_code": 3, "step": 7}, "exit code 3 (a hang: its stacks are in logs/), after step 7"),
        ({"state": "failed", "exit_code": 1, "step": 0}, "exit code 1, after step 0"),
        ({"state": "stopped", "exit_code": 75, "step": 7}, None),
        ({"state": "failed"}, None),
        ([], None),
    ],
)
def test_how_the_last_start_failed_is_said(tmp_path, status, note):
    assert failure_of_last_start(tmp_path) == []
    (tmp_path / "status.json").write_text(json.dumps(status))
    assert failure_of_last_start(tmp_path) == [f"the last start failed with {note}"] * (note is not None)
