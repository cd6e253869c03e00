"""A small declared experiment with real runs and evaluations: stopped, resumed, made again."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.distributed.runs import TEXT, make_datasets

ROOT = Path(__file__).resolve().parents[2]
CONFIG = yaml.safe_load(TEXT % ("llama", "true"))
TOOL = [sys.executable, "tools/experiment.py"]


@pytest.fixture
def spec(tmp_path):
    """Text in three splits, and a model that takes a fraction of a second for a step."""
    make_datasets(tmp_path)
    config = {**CONFIG, "checkpoint": {"interval": 4}, "evaluation": {"rows": 3, "interval": 50}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(config))
    build = [
        "tools/build_shards.py",
        "--input",
        str(tmp_path / "text" / "train"),
        "--tokenizer",
        str(tmp_path / "tokenizer"),
    ]
    build += ["--split-by", "document", "--held-out", "tuning=30%,report=30%", "--output", str(tmp_path / "data")]
    cross_entropy = {"ebft.rl_coef": 0, "ebft.ce_coef": 1}
    document = {
        "question": "Does it run?",
        "output_dir": str(tmp_path / "experiments" / "one"),
        "config": str(tmp_path / "base.yaml"),
        "prepare": [{"makes": str(tmp_path / "data"), "run": build}],
        "splits": {split: str(tmp_path / "data" / split) for split in ("train", "tuning", "report")},
        "start": "warm",
        "seeds": [0],
        "tuning": {"rows": 8},
        "evaluation": {
            **{"rows": 8, "temperatures": [0.8, 1.0], "equal_temperature": 1.0, "completion_lengths": [2]},
            "feature_maps": {"last": {"embed_method": "last_token"}},
        },
        "arms": {
            "warm": {"set": cross_entropy, "seeds": [0]},
            "ce": {"set": {**cross_entropy, "train.max_steps": 2}, "tune": {"train.lr": [1e-3, 3e-3]}},
            "ebft": {"set": {"train.max_steps": 30, "ebft.advantage_estimator": "token_critic",
                             "ebft.alignment": "inner_product", "ebft.use_whitening": False}},
        },
        "primary": [{"arm": "ebft", "against": "ce"}],
    }  # fmt: skip
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def finished(path, *options):
    return subprocess.run([*TOOL, str(path), *options], cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.slow  # 4 minutes: a dozen processes that import everything
@pytest.mark.timeout(900)
def test_an_experiment_is_stopped_resumed_and_made_again(spec, tmp_path):
    output = tmp_path / "experiments" / "one"
    metrics = output / "runs" / "ebft" / "seed-0" / "metrics.jsonl"
    process = subprocess.Popen([*TOOL, str(spec)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 400
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=60)
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 128 + signal.SIGTERM, said
    assert not (output / "results.json").exists()

    # The arm is another one now, whose run is there already.
    document = yaml.safe_load(spec.read_text())
    document["arms"]["ebft"]["set"]["train.max_steps"] = 31
    spec.write_text(yaml.safe_dump(document, sort_keys=False))
    changed = finished(spec)
    assert changed.returncode == 2 and "train.max_steps" in changed.stderr, changed.stdout + changed.stderr
    document["arms"]["ebft"]["set"]["train.max_steps"] = 30
    spec.write_text(yaml.safe_dump(document, sort_keys=False))

    resumed = finished(spec)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(31)), "nothing lost, nothing repeated"  # 0: evaluated before
    results = json.loads((output / "results.json").read_text())
    assert (output / "report.html").is_file()
    again = finished(spec)
    assert again.returncode == 0 and "train " not in again.stdout, again.stdout

    # Whoever doubts a table makes it again, elsewhere, and gets it to the last digit.
    other = tmp_path / "experiments" / "again"
    made = finished(spec, "--output", str(other))
    assert made.returncode == 0, made.stdout + made.stderr
    for split in ("tuning", "report"):
        places = sorted((output / "evaluations" / split).rglob("evaluation.json"))
        assert places
        for place in places:
            twin = other / place.relative_to(output)
            ours, theirs = (json.loads(path.read_text()) for path in (place, twin))
            assert ours["conditions"] == theirs["conditions"], twin
    assert json.loads((other / "results.json").read_text())["chosen"] == results["chosen"]
