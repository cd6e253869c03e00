"""The commands that docs/data.md opens with do what it says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.distributed.ranks import free_port
from tests.integration.conftest import LAUNCH_TIMEOUT_SECONDS, REPOSITORY


def test_own_code_in_three_commands(data, tmp_path):
    page = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")
    block = re.search(r"## Your own code, in three commands.*?```bash\n(.*?)```", page, re.DOTALL)
    assert block, "the section with its commands"
    commands = block[1].strip().splitlines()
    assert [command.split()[1] for command in commands] == [
        "tools/train_tokenizer.py",
        "tools/build_shards.py",
        "launcher/train.py",
    ]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for command in commands:
        command = command.replace("my_code", str(data.train.parent / "text" / "train"))
        command = command.replace("runs/data", str(tmp_path))
        if command.startswith("deepspeed "):
            command = command.replace("deepspeed ", f"deepspeed --master_port {free_port()} ")
            command += f" output_dir={tmp_path / 'run'}"
        completed = subprocess.run(
            ["bash", "-c", command],
            cwd=REPOSITORY,
            env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=LAUNCH_TIMEOUT_SECONDS,
        )
        assert completed.returncode == 0, f"{command}\n{completed.stdout}\n{completed.stderr}"
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"
