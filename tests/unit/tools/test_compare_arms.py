"""`tools/compare_arms.py`: a page of paired intervals, every problem of the command line at once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def compare_arms(*arguments):
    command = [sys.executable, str(ROOT / "tools" / "compare_arms.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def evaluation(directory, values):
    directory.mkdir()
    content = {
        "rows": len(values),
        "temperature": 0.6,
        "data": "d",
        "eval/ce_loss": sum(values) / len(values),
    }
    (directory / "evaluation.json").write_text(json.dumps(content | {"per_row": {"eval/ce_loss": values}}))
    return directory


def test_compare_arms_writes_a_page(tmp_path):
    one, other = evaluation(tmp_path / "one", [2.0, 3.0, 2.5]), evaluation(tmp_path / "two", [1.0, 2.0, 1.5])
    answer = compare_arms("--arm", f"warm start={one}", "--arm", f"new={other}", "--output", tmp_path / "out")
    assert answer.returncode == 0, answer.stderr
    (difference,) = json.loads((tmp_path / "out" / "comparison.json").read_text())["differences"]
    assert difference["shown"] == "lower"
    assert difference["by_row"]["mean"] == pytest.approx(-1.0)


def test_compare_arms_names_every_problem(tmp_path):
    answer = compare_arms("--arm", "nothing", "--reference", "lost", "--output", tmp_path / "out")
    assert answer.returncode == 2
    for expected in ("NAME=PATH", "at least two", "'lost'"):
        assert expected in answer.stderr
    assert not (tmp_path / "out").exists()
