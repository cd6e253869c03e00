"""What stands in a run directory under the name of a run's own file, and is none, is refused before anything starts."""

import json
import os
from types import SimpleNamespace

import pytest

from ebft_mega.errors import ConfigError, InputError
from ebft_mega.lifecycle import tracing
from ebft_mega.lifecycle.findings import OWN_FILES, OWN_FOLDERS, last_logged_step, strange_entries
from ebft_mega.lifecycle.run_directory import make_run_directory
from ebft_mega.runtime.run_lock import LOCK_NAME, RunLock


@pytest.mark.parametrize("name", [*OWN_FILES, "logs/rank-0003.log"])
@pytest.mark.parametrize("make, words", [(os.mkdir, "a directory"), (os.mkfifo, "a FIFO")], ids=["folder", "fifo"])
def test_a_folder_or_a_fifo_in_place_of_a_file_is_named(tmp_path, name, make, words):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    make(tmp_path / name)
    config = SimpleNamespace(output_dir=tmp_path, place=lambda key: "run.yaml:1")
    with pytest.raises(ConfigError) as caught:
        make_run_directory(config)
    (problem,) = caught.value.problems
    assert problem.where == f"run.yaml:1: {tmp_path / name}" and problem.found == words


@pytest.mark.parametrize("name", OWN_FOLDERS)
def test_a_file_in_place_of_a_folder_is_named(tmp_path, name):
    (tmp_path / name).write_text("")
    (problem,) = strange_entries(tmp_path)
    assert problem.where == str(tmp_path / name) and problem.found == "a file"


def test_what_a_run_leaves_is_not_strange(tmp_path):
    for name in (*OWN_FOLDERS, "hf"):
        (tmp_path / name).mkdir()
    for name in (*OWN_FILES, "logs/rank-0000.log"):
        (tmp_path / name).write_text("")
    assert not list(strange_entries(tmp_path)) and not list(strange_entries(tmp_path / "nothing"))


@pytest.mark.parametrize("step", [10**50, 2**63, -1, True, 1.5, None, "9" * 5000, "[" * 5000])
def test_a_line_of_metrics_without_a_step_is_passed_over(tmp_path, step):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 7}}\n{{"step": {step if isinstance(step, str) else json.dumps(step)}}}\n')
    assert last_logged_step(path) == 7


def test_a_lock_that_is_a_directory_is_refused(tmp_path):
    (tmp_path / LOCK_NAME).mkdir()
    with pytest.raises(InputError, match="Is a directory"), RunLock(tmp_path):
        pass


@pytest.mark.parametrize("place", ["file/below", "a" * 300, "/proc/none"])
def test_a_trace_that_cannot_be_written_is_refused_before_the_step(tmp_path, monkeypatch, place):
    (tmp_path / "file").touch()
    monkeypatch.setattr(tracing, "from_first_rank", lambda compute: compute())
    with pytest.raises(ConfigError, match="--trace-step: DIR: found .*, which cannot be written"):
        tracing.trace_first_step(None, None, None, None, tmp_path / place)
