"""A build that a signal stops: one line, every process gone, and the same command resumes it."""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ebft_mega.data.tokenizers.tokenizer_training import train_tokenizer

REPOSITORY = Path(__file__).resolve().parents[4]
SECONDS = 60


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Text and a tokenizer for it."""
    directory = tmp_path_factory.mktemp("stopped")
    (directory / "text").mkdir()
    for number in range(16):
        content = "".join(f"value_{number}_{line} = {line * number}\n" for line in range(1500))
        (directory / "text" / f"{number:02d}.py").write_text(content)
    (directory / "few").mkdir()
    shutil.copy(argparse.__file__, directory / "few")
    train_tokenizer(directory / "few", 512, directory / "tokenizer")
    return directory


@pytest.mark.parametrize(
    ("name", "to_all", "processes"),
    [
        ("SIGINT", True, 1),  # any number may resume it, and one costs no start of others
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("SIGTERM", False, 2), ("SIGHUP", True, 2)]),
    ],
)
def test_a_build_is_stopped_with_its_workers_and_resumed(text, tmp_path, name, to_all, processes):
    command = [sys.executable, "tools/build_shards.py", "--input", text / "text", "--tokenizer", text / "tokenizer"]
    command += ["--output", tmp_path / "out", "--part-bytes", "30000", "--processes"]
    options = {"cwd": REPOSITORY, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    builder = subprocess.Popen([*map(str, command), "2"], start_new_session=True, **options)
    workers = []
    try:
        deadline = time.monotonic() + SECONDS
        while not any((tmp_path / ".out.partial").glob("part-*")):  # work that must not be lost
            assert time.monotonic() < deadline and builder.poll() is None
            time.sleep(0.02)
        workers = psutil.Process(builder.pid).children(recursive=True)
        started = time.monotonic()
        (os.killpg if to_all else os.kill)(builder.pid, signal.Signals[name])
        output, _ = builder.communicate(timeout=SECONDS)
        assert builder.returncode == 128 + signal.Signals[name] and time.monotonic() - started < 6, output
        assert output.splitlines()[-1] == f"stopped by {name}" and "Traceback" not in output
        assert len(workers) >= 2 and not psutil.wait_procs(workers, timeout=3)[1]
    finally:
        for process in (builder, *workers):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
    done = subprocess.run([*map(str, command), str(processes)], timeout=4 * SECONDS, **options)
    assert done.returncode == 0 and "resuming what an earlier process left" in done.stdout, done.stdout
