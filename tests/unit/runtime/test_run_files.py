"""Outcome, environment and logs of a run."""

import json
import logging
import shutil
from pathlib import Path

import pytest

from ebft_mega.runtime.repeatability import VARIABLES, describe_numerics
from ebft_mega.runtime.run_files import (
    failure_on_record,
    record_failure,
    setup_rank_log,
    write_environment,
    write_status,
)


@pytest.fixture
def package_logger():
    logger = logging.getLogger("ebft_mega")
    state = (list(logger.handlers), logger.level, logger.propagate)
    yield logger
    for handler in logger.handlers:
        handler.close()
    logger.handlers, level, logger.propagate = state
    logger.setLevel(level)


def test_status(tmp_path):
    path = write_status(tmp_path, "stopped", 75, 12, "step-00000012")
    assert json.loads(path.read_text()) == {
        "state": "stopped",
        "exit_code": 75,
        "checkpoint": "step-00000012",
        "step": 12,
    }
    assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"]


def test_only_a_failure_is_a_failure_on_record(tmp_path):
    assert failure_on_record(tmp_path) is None
    write_status(tmp_path, "done", 0, 3, None)
    assert failure_on_record(tmp_path) is None
    write_status(tmp_path, "failed", 4, 3, None)
    assert failure_on_record(tmp_path) == 4


@pytest.mark.parametrize("code", ["Infinity", "NaN", "1e999", "9" * 5000, "[]", "null", '"4x"'])
def test_an_exit_code_that_is_none_is_no_failure_on_record(tmp_path, code):
    (tmp_path / "status.json").write_text(f'{{"state": "failed", "exit_code": {code}}}')
    assert failure_on_record(tmp_path) is None


def test_environment_names_versions(tmp_path):
    import numpy

    content = json.loads(write_environment(tmp_path, {"world_size": 2}).read_text())
    assert content["packages"]["numpy"] == numpy.__version__
    assert content["world_size"] == 2
    assert content["git_revision"] is None or len(content["git_revision"]) >= 7


def test_environment_says_what_decides_bits_and_nothing_else_of_the_environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    monkeypatch.setenv("HF_TOKEN", "a-secret")
    found = describe_numerics()
    assert any("oneDNN" in line or "MKL" in line or "BLAS" in line for line in found["torch"]["build"])
    assert found["threads"]["intra_op"] >= 1 and found["threads"]["inter_op"] >= 1
    assert found["cpu"]["kernels"] and (not Path("/proc/cpuinfo").exists() or found["cpu"]["flags"])
    assert found["deterministic"]["algorithms"] is False
    assert found["environment"]["OMP_NUM_THREADS"] == "1" and found["environment"]["NCCL_ALGO"] == "Ring"
    assert set(found["environment"]) <= set(VARIABLES) and "a-secret" not in json.dumps(found)


def test_rank_logs(tmp_path, package_logger, capsys):
    path = setup_rank_log(tmp_path, 3)
    assert path == tmp_path / "logs" / "rank-0003.log"
    logging.getLogger("ebft_mega.train").info("from rank three")
    assert "from rank three" in path.read_text()

    first = setup_rank_log(tmp_path, 0)
    assert len(package_logger.handlers) == 2
    logging.getLogger("ebft_mega.train").info("only in the file")
    logging.getLogger("ebft_mega.train").warning("seen by the user")
    assert "only in the file" in first.read_text()
    assert "seen by the user" in first.read_text()
    assert "from rank" not in first.read_text()
    shown = capsys.readouterr().err
    assert "seen by the user" in shown
    assert "only in the file" not in shown


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"state": "failed"}', '{"state": "failed", "exit_code": []}']
)
def test_a_damaged_status_is_no_failure_on_record(tmp_path, content):
    (tmp_path / "status.json").write_text(content)
    assert failure_on_record(tmp_path) is None
    assert record_failure(tmp_path, 1, 3) == 1
    assert failure_on_record(tmp_path) == 1


@pytest.mark.parametrize("change", ["removed", "folder removed", "renamed"])
def test_a_rank_log_that_vanished_is_made_anew(tmp_path, package_logger, change):
    path = setup_rank_log(tmp_path, 1)
    logger = logging.getLogger("ebft_mega.train")
    logger.info("before")
    if change == "removed":
        path.unlink()
    elif change == "renamed":
        path.parent.rename(tmp_path / "old")
    else:
        shutil.rmtree(path.parent)
    logger.info("after")
    assert path.read_text().endswith("ebft_mega.train: after\n")


@pytest.mark.parametrize("obstacle", ["a file", "no directory", "full disk"])
def test_a_rank_log_that_cannot_be_written_is_one_warning(tmp_path, package_logger, obstacle, capsys):
    output = tmp_path / "run"
    if obstacle != "no directory":
        output.mkdir()
    if obstacle == "a file":
        (output / "logs").write_text("notes")
    elif obstacle == "full disk":
        (output / "logs").mkdir()
        (output / "logs" / "rank-0001.log").symlink_to("/dev/full")
    setup_rank_log(output, 1)
    for number in range(3):
        logging.getLogger("ebft_mega.train").info("line %d", number)
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1 and "Traceback" not in said
    assert output.exists() == (obstacle != "no directory")
