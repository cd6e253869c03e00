"""The benchmark's tool as a user runs it, on its smallest case."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_quick_benchmark_runs_and_writes_its_files(tmp_path):
    files = {name: tmp_path / name for name in ("bench.json", "bench.png", "bench.md")}
    command = [sys.executable, "tools/bench_step.py", "--quick", "--output", str(files["bench.json"])]
    command += ["--plot", str(files["bench.png"]), "--markdown", str(files["bench.md"])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    (case,) = json.loads(files["bench.json"].read_text())["cases"]
    assert files["bench.md"].read_text() in done.stdout
    assert files["bench.png"].stat().st_size > 10_000
    # In one step the baseline holds at least the logits of its last pass in float32, twice: as logits and scaled.
    naive, ours = case["naive"]["peak_bytes"], case["ours"]["peak_bytes"]
    assert naive > 2 * case["naive"]["rows_policy_forward"] * 8192 * 4
    assert 0 < ours < 0.5 * naive
    assert case["ratios"]["seconds ours / naive"] < 1
