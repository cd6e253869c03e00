"""Real runs whose reader goes away, and whose files are removed while they run."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from tests.integration.conftest import REPOSITORY, settings

pytestmark = pytest.mark.slow
SECONDS = 300
COMMAND = [sys.executable, "launcher/train.py", "--config", "configs/tiny_cpu.yaml"]


def started(data, output, *overrides, **streams):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*COMMAND, *settings(data, output, *overrides)]
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, **streams)


def assert_done(output, step):
    status = json.loads((output / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"]) == ("done", 0, step)
    lines = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(lines)) == list(range(step + 1))
    assert (output / "hf" / "config.json").exists() and (output / "report.html").exists()


def test_a_run_whose_reader_takes_one_line_trains_to_its_end(data, tmp_path):
    run = started(data, tmp_path / "out", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        assert run.stdout.readline()
        run.stdout.close()
        assert run.wait(SECONDS) == 0
    finally:
        run.kill()
        run.wait(SECONDS)
    assert_done(tmp_path / "out", 4)


@pytest.mark.parametrize("is_whole", [False, True])
def test_files_or_all_that_is_removed_while_a_run_is_running(data, tmp_path, is_whole):
    output, console = tmp_path / "out", tmp_path / "console"
    with console.open("w") as stream:
        run = started(data, output, "train.max_steps=30", "checkpoint.interval=5", stdout=stream, stderr=stream)
    try:
        deadline = time.monotonic() + SECONDS
        while "step 7/30" not in console.read_text():
            assert run.poll() is None and time.monotonic() < deadline, console.read_text()
            time.sleep(0.05)
        if is_whole:
            output.rename(tmp_path / "moved")
        else:
            for name in ("metrics.jsonl", "run.lock", "samples.jsonl"):
                (output / name).unlink()
            for name in ("checkpoints", "logs", "tensorboard"):
                shutil.rmtree(output / name, ignore_errors=True)
        code = run.wait(SECONDS)
    finally:
        run.kill()
        run.wait(SECONDS)
    said = console.read_text()
    assert "taken" not in said
    if is_whole:
        assert code == 1 and "the run directory was removed or renamed while the run was running" in said
        assert not output.exists() and not (tmp_path / "moved" / "status.json").exists()
    else:
        assert code == 0, said
        assert_done(output, 30)
        assert (output / "checkpoints" / "step-00000030").is_dir() and (output / "logs" / "rank-0000.log").exists()
