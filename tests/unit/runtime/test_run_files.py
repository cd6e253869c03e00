"""Outcome, environment and logs of a run."""

import json
import logging

import pytest

from ebft_mega.runtime.run_files import (
    failure_on_record,
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


def test_environment_names_versions(tmp_path):
    import numpy

    content = json.loads(write_environment(tmp_path, {"world_size": 2}).read_text())
    assert content["packages"]["numpy"] == numpy.__version__
    assert content["world_size"] == 2
    assert content["git_revision"] is None or len(content["git_revision"]) >= 7


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
