"""The command lines around experiments and comparisons."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]


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


@pytest.fixture(scope="module")
def quickstart():
    return runpy.run_path(str(ROOT / "tools" / "quickstart.py"), run_name="quickstart")


def test_the_default_budget_runs_the_configured_steps(quickstart):
    share = quickstart["share_of_steps"](quickstart["FULL_SECONDS"])
    assert share == 1
    assert quickstart["evaluation_rows"](share) == quickstart["FULL_ROWS"]


def test_budgets_scale_what_is_not_fixed(quickstart):
    full, fixed = quickstart["FULL_SECONDS"], quickstart["FIXED_SECONDS"]
    share, rows = quickstart["share_of_steps"], quickstart["evaluation_rows"]
    assert share((full + fixed) / 2) == 0.5 and rows(0.5) == quickstart["FULL_ROWS"] // 2
    assert share(0) == 0 and rows(0) == quickstart["LEAST_ROWS"]
    assert share(2 * full - fixed) == 2 and rows(2) == quickstart["FULL_ROWS"]


def test_evaluation_refuses_overrides_of_a_file_that_is_not_given():
    command = [sys.executable, "tools/evaluate.py", "--model", "m", "--data", "d", "--output", "o"]
    completed = subprocess.run(
        [*command, "--set", "data.document_masking=true"], cwd=ROOT, capture_output=True, text=True
    )
    assert completed.returncode == 2 and "keys of --config, which is not given" in completed.stderr
