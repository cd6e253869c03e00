"""What stands in a run directory under the name of a run's own file, and is none, is refused before anything starts."""

import json
import os
from types import SimpleNamespace

import pytest

from ebft_mega.errors import ConfigError, InputError
from ebft_mega.lifecycle import tracing
from ebft_mega.lifecycle.findings import OWN_FILES, OWN_FOLDERS, last_logged_step, strange_entries
from ebft_mega.lifecycle.run_directory import make_run_directory
from ebft_mega.metrics.announcer import Announcer
from ebft_mega.planning.input_places import output_notes
from ebft_mega.planning.short_plan import TraceRequest
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


@pytest.mark.parametrize("name", ["metrics.jsonl", "status.json", "logs/rank-0003.log"])
def test_a_link_in_place_of_a_file_is_named(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    for target in ("there", "nowhere"):
        (tmp_path / name).parent.joinpath("there").write_text("")
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to(target)
        (problem,) = strange_entries(tmp_path)
        assert problem.where == str(tmp_path / name) and problem.found == f"a link to {target}"


def test_folders_may_be_links(tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    for name in (*OWN_FOLDERS, "hf", "tensorboard"):
        (tmp_path / "scratch" / name).mkdir(parents=True)
        (output / name).symlink_to(tmp_path / "scratch" / name)
    assert not list(strange_entries(output))


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


@pytest.mark.parametrize(
    "permissions, mode, is_noted",
    [("group", 0o700, True), ("group", 0o750, True), ("group", 0o770, False), ("private", 0o700, False)],
)
def test_a_directory_that_the_group_cannot_use_is_noted(tmp_path, permissions, mode, is_noted):
    output = tmp_path / "a run"
    config = SimpleNamespace(output_dir=output, permissions=permissions)
    assert output_notes(config) == []
    output.mkdir()
    output.chmod(mode)
    found = output_notes(config)
    assert len(found) == is_noted and all(note.endswith(f": chmod -R g+rwX '{output}'") for note in found)


def test_a_lock_that_is_a_directory_is_refused(tmp_path):
    (tmp_path / LOCK_NAME).mkdir()
    with pytest.raises(InputError, match="Is a directory"), RunLock(tmp_path):
        pass


@pytest.mark.parametrize("place", ["file/below", "a" * 300, "/proc/none"])
def test_a_trace_that_cannot_be_written_is_refused_before_the_step(tmp_path, monkeypatch, place):
    (tmp_path / "file").touch()
    monkeypatch.setattr(tracing, "from_first_rank", lambda compute: compute())
    with pytest.raises(ConfigError, match="--trace-step: DIR: found .*, which cannot be written"):
        tracing.trace_one_step(None, None, None, None, TraceRequest(tmp_path / place), Announcer())
