"""The launcher at parallel layouts: the step trace agrees with one process, and whole runs end the same."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.conftest import REPOSITORY, launch, settings

CONFIG = ["--config", "configs/tiny_cpu.yaml"]
TENSOR, PIPELINE = "parallel.tensor_parallel_size", "parallel.pipeline_parallel_size"
LAYOUTS = {
    "dp2": (2, ()),
    "tp2": (2, (f"{TENSOR}=2",)),
    "pp2": (2, (f"{PIPELINE}=2",)),
    "tp2-pp2": (4, (f"{TENSOR}=2", f"{PIPELINE}=2")),
    "tp4": (4, (f"{TENSOR}=4",)),
    "pp4": (4, (f"{PIPELINE}=4",)),
    "dp2-pp2-zero1": (4, (f"{PIPELINE}=2", "zero.stage=1")),
}


def trace(data, tmp_path, name: str, ranks: int | None, overrides: tuple[str, ...]):
    """Directory of the step trace of a layout."""
    output = tmp_path / name
    more = ("train.micro_batch_size=1", *overrides)
    completed = launch([*CONFIG, *settings(data, tmp_path / "run", *more), "--trace-step", str(output)], ranks)
    assert completed.returncode == 0, completed.stdout
    return output


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """The trace of one process."""
    return trace(data, tmp_path_factory.mktemp("alone"), "trace", None, ())


# Slow: `tests/distributed/train/test_layouts.py` compares the same steps on ranks without a launcher.
@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_trace_of_a_layout_agrees_with_one_process(name, data, alone, tmp_path):
    ranks, overrides = LAYOUTS[name]
    found = trace(data, tmp_path, name, ranks, overrides)
    command = [sys.executable, "tools/compare_traces.py", str(alone), str(found), "--tolerance", "2e-5"]
    completed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (completed.returncode, completed.stdout) == (0, "the traces agree\n")
    layout = json.loads((found / "step.json").read_text())["layout"]
    assert layout["data_parallel"] * layout["tensor_parallel"] * layout["pipeline_parallel"] == ranks


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tp2", "pp2"])
def test_a_whole_run_ends_as_with_data_parallel_ranks(name, data, tmp_path):
    runs = {}
    for layout in ("dp2", name):
        ranks, overrides = LAYOUTS[layout]
        runs[layout] = tmp_path / layout
        completed = launch([*CONFIG, *settings(data, runs[layout], *overrides)], ranks)
        assert completed.returncode == 0, completed.stdout
    expected, found = (
        [json.loads(line) for line in (runs[layout] / "metrics.jsonl").read_text().splitlines()]
        for layout in ("dp2", name)
    )
    assert len(expected) == len(found) == 5
    for before, after in zip(expected, found, strict=True):
        assert set(before) == set(after)
        for key, value in before.items():
            if not key.startswith(("perf/", "memory/", "time")):
                assert after[key] == pytest.approx(value, rel=2e-3, abs=2e-4), (key, before["step"])
    weights = [load_file(runs[layout] / "hf" / "model.safetensors") for layout in ("dp2", name)]
    assert weights[0].keys() == weights[1].keys()
    for key, tensor in weights[0].items():
        assert tensor.shape == weights[1][key].shape
        # Four steps at lr 1e-3; rounding decides on the few elements whose gradient is next to nothing.
        assert torch.quantile((tensor - weights[1][key]).abs().flatten(), 0.99) <= 1e-4, key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ((f"{TENSOR}=3",), "parallel.tensor_parallel_size"),
        ((f"{PIPELINE}=8",), "parallel.pipeline_parallel_size"),
        ((f"{TENSOR}=2", "parallel.sequence_parallel=true"), "parallel.sequence_parallel"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_before_anything_starts(overrides, says, data, tmp_path):
    completed = launch([*CONFIG, *settings(data, tmp_path / "run", *overrides)], ranks=2)
    assert completed.returncode == 2, completed.stdout
    assert says in completed.stdout and "expected" in completed.stdout
    assert not (tmp_path / "run").exists()
