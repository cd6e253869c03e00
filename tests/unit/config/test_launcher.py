"""The launcher up to the start of a run, as a user calls it: exit codes, texts, speed, no heavy import."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
HEAVY = ("torch", "deepspeed", "megatron", "webdataset", "transformers", "sentencepiece")
# Runs the launcher in this interpreter and reports, last of all, which heavy packages it has imported.
PROBE = f"""
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("HEAVY", [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""


def launch(*arguments, **environment):
    """Run the launcher with the heavy-import probe."""
    return subprocess.run(
        [sys.executable, "-c", PROBE, "launcher/train.py", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_dry_run(inputs):
    done = launch("--config", inputs.write(), "--dry-run", "--world-size", "4", "--set", "train.lr=1e-5", "seed=3")
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stderr
    assert "lr: 1.0e-05" in done.stdout and "seed: 3" in done.stdout
    assert "micro-batches per replica and step 1" in " ".join(done.stdout.split())
    assert "peak (states and the largest phase)" in done.stdout
    assert not (inputs.root / "run").exists()


def test_dry_run_takes_the_world_size_of_its_launcher(inputs):
    arguments = ("--config", inputs.write(), "--dry-run", "--local_rank=1")
    assert launch(*arguments, WORLD_SIZE="2", RANK="1").stdout == ""
    first_rank = launch(*arguments, WORLD_SIZE="2", RANK="0")
    assert "data-parallel size 2" in " ".join(first_rank.stdout.split())


def test_bad_configuration_and_bad_input(inputs):
    done = launch("--config", inputs.write(ebft__strde=1, train__lr="fast"))
    assert done.returncode == 2 and done.stdout == "" and "HEAVY []" in done.stderr
    assert "run.yaml:14: train.lr: found 'fast'" in done.stderr
    assert "run.yaml:16: ebft.strde: found an unknown key" in done.stderr
    (inputs.root / "train" / "index.npy").unlink()
    done = launch("--config", inputs.write())
    assert done.returncode == 2 and "HEAVY []" in done.stderr and "index.npy" in done.stderr
    assert not (inputs.root / "run").exists()
    assert launch("--config", inputs.write(), RANK="1").stderr.startswith("HEAVY")


@pytest.mark.parametrize(
    "arguments", [("--confg", "x"), (), ("--config", "x", "--world-size", "2"), ("--config", "x", "y")]
)
def test_command_line_mistakes(arguments):
    done = launch(*arguments)
    assert done.returncode == 2 and "usage:" in done.stderr and "HEAVY []" in done.stderr


def test_help_and_dry_run_answer_at_once(inputs):
    assert "HEAVY []" in launch("--help").stderr
    path = inputs.write()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        launch("--config", path, "--dry-run")
        times.append(time.perf_counter() - start)
    assert min(times) < 3  # half a second on a quiet machine
