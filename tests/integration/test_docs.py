"""The README's path from a fresh clone to a model does what it says, as printed."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.distributed.ranks import free_port
from tests.integration.conftest import LAUNCH_TIMEOUT_SECONDS, REPOSITORY

SETUP = "make setup"


def fresh_clone(target):
    """A copy of the sources, with the environment that `make setup` would make."""
    left_out = shutil.ignore_patterns(".*", "runs", "build", "__pycache__", "*.egg-info", "tests", "my.yaml")
    shutil.copytree(REPOSITORY, target, ignore=left_out)
    environment = target / ".venv" / "bin"
    environment.mkdir(parents=True)
    # Nothing but its place on PATH: the programs are those that run this test.
    (environment / "activate").write_text(f'PATH="{os.path.dirname(sys.executable)}:$PATH"\n', encoding="utf-8")


@pytest.mark.timeout(3 * LAUNCH_TIMEOUT_SECONDS)
def test_the_path_of_the_readme(tmp_path):
    page = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    block = re.search(r"## Your own run\n.*?```\n(.*?)```", page, re.DOTALL)
    assert block, "the section with its commands"
    commands = block[1].strip().splitlines()
    programs = [re.sub(r"^(python|deepspeed) ", "", command).split()[0] for command in commands]
    assert commands[0] == SETUP and programs[3:] == [
        "tools/train_tokenizer.py",
        "tools/build_shards.py",
        "tools/new_config.py",
        "launcher/train.py",
        "launcher/train.py",
        "tools/evaluate.py",
        "tools/convert_hf.py",
        "launcher/train.py",
    ]
    clone = tmp_path / "clone"
    fresh_clone(clone)
    # As printed, but that `make setup` has been run and that ports are free ones: other jobs may run beside this one.
    script = "\n".join(["set -e", *commands[1:]])
    for _ in range(script.count("deepspeed ")):
        script = script.replace("deepspeed launcher", f"deepspeed --master_port {free_port()} launcher", 1)
    completed = subprocess.run(
        ["bash", "-c", script],
        cwd=clone,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=2 * LAUNCH_TIMEOUT_SECONDS,
    )
    printed = f"{completed.stdout}\n{completed.stderr}"
    assert completed.returncode == 0, printed
    status = json.loads((clone / "runs" / "my" / "status.json").read_text(encoding="utf-8"))
    assert (status["state"], status["step"]) == ("done", 20)
    steps = [json.loads(line)["step"] for line in (clone / "runs/my/metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 20 and steps.count(10) == 1
    assert "going on after step 10" in printed
    evaluation = json.loads((clone / "runs" / "my-evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    assert "eval/ce_loss" in json.dumps(evaluation)
    for name in ("runs/my/hf", "runs/my-model"):
        assert (clone / name / "config.json").is_file() and list((clone / name).glob("*.safetensors"))
    split = {
        side: json.loads((clone / f"runs/data/mine/{side}/dataset.json").read_text()) for side in ("train", "held-out")
    }
    assert split["train"]["tokens"] > split["held-out"]["tokens"] > 0
