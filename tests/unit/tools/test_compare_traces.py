"""Traces that agree, and the first place where they do not."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tools.compare_traces import different_projections

REPOSITORY = Path(__file__).resolve().parents[3]
NUMBERS = (
    *("rl_loss", "ce_loss", "cfm_loss", "loss", "grad_norm"),
    *("parameter_checksum_before", "parameter_checksum_after", "update_norm"),
)


def write_trace(directory: Path, **changes) -> Path:
    tensors = {
        "tokens": torch.arange(6).view(2, 3),
        "rollouts": torch.arange(8).view(2, 1, 2, 2),
        "gram": torch.eye(2, dtype=torch.float64).expand(2, 2, 2, 2).contiguous(),
        "advantage": torch.linspace(-1, 1, 4, dtype=torch.float64).view(2, 1, 2),
        "logprobs": torch.full((2, 1, 2, 2), -1.0),
    }
    tensors |= {name: value for name, value in changes.items() if isinstance(value, torch.Tensor)}
    numbers = dict.fromkeys(NUMBERS, 1.5) | {"ce_loss": None, "gradient_projections": [0.5, -1.0]}
    numbers |= {name: value for name, value in changes.items() if name in numbers}
    directory.mkdir()
    save_file(tensors, directory / "step.safetensors")
    (directory / "step.json").write_text(json.dumps(numbers))
    return directory


def compare(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/compare_traces.py", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def test_equal_traces_agree(tmp_path):
    result = compare(write_trace(tmp_path / "a"), write_trace(tmp_path / "b"))
    assert result.returncode == 0 and "agree" in result.stdout, result.stderr


@pytest.mark.parametrize(
    ("change", "first_line"),
    [
        ({"rollouts": torch.arange(8).view(2, 1, 2, 2).flip(0)}, "rollouts[0, 0, 0, 0]: 0 against 4; 8 of 8"),
        ({"advantage": torch.zeros(2, 1, 2, dtype=torch.float64)}, "advantage[0, 0, 0]: -1.0 against 0.0; 4 of 4"),
        ({"logprobs": torch.full((2, 1, 2, 2), float("nan"))}, "logprobs[0, 0, 0, 0]: -1.0 against nan"),
        ({"gram": torch.zeros(2, 2, 3, 3, dtype=torch.float64)}, "gram: shape (2, 2, 2, 2) against (2, 2, 3, 3)"),
        ({"grad_norm": 1.6}, "grad_norm: 1.5 against 1.6"),
        ({"grad_norm": "nan"}, "grad_norm: 1.5 against nan"),
        ({"ce_loss": 0.5}, "ce_loss: None against 0.5"),
        (
            {"gradient_projections": [0.5, -1.0002]},
            "gradient_projections[1]: -1.0 against -1.0002; 1 of 2 differ, at most by 0.0002",
        ),
    ],
)
def test_the_first_difference_is_named(tmp_path, change, first_line):
    result = compare(write_trace(tmp_path / "a"), write_trace(tmp_path / "b", **change))
    assert result.returncode == 1
    assert result.stdout.splitlines()[0].startswith(first_line), result.stdout


def test_tolerance_is_for_numbers_not_for_tokens(tmp_path):
    first = write_trace(tmp_path / "a")
    near = write_trace(tmp_path / "b", advantage=torch.linspace(-1, 1, 4, dtype=torch.float64).view(2, 1, 2) + 1e-3)
    tokens = write_trace(tmp_path / "c", tokens=torch.arange(1, 7).view(2, 3))
    assert compare(first, near).returncode == 1
    assert compare(first, near, "--tolerance", "0.01").returncode == 0
    assert compare(first, tokens, "--tolerance", "10").returncode == 1


def test_projections_are_compared_with_the_norm_of_the_gradient(tmp_path):
    """What small gradients differ by is small."""
    first, second = (
        write_trace(tmp_path / name, grad_norm=0.01, gradient_projections=[0.5 + change, -1.0])
        for name, change in (("a", 0.0), ("b", 5e-6))
    )
    result = compare(first, second)
    assert (result.returncode, len(result.stdout.splitlines())) == (1, 1)
    assert compare(first, second, "--tolerance", "1e-3").returncode == 0


@pytest.mark.parametrize(
    ("left", "right", "words"),
    [
        ([1.0, 2.0], [1.0, 2.09], None),
        ([1.0, 2.0], [1.2, 2.3], "[0]: 1.0 against 1.2; 2 of 2 differ, at most by 0.3"),
        ([1.0, 2.0], [1.0, math.nan], "[1]: 2.0 against nan; 1 of 2 differ"),
        ([1.0, 2.0], [1.0], ": 2 against 1"),
        ([1.0], [], ": only in a"),
        ([], None, ": [] against None"),
        (None, None, None),
    ],
)
def test_projections_that_differ(left, right, words):
    lines = different_projections(left, right, 0.1, (Path("a"), Path("b")))
    assert len(lines) == (words is not None)
    assert all(line.startswith(f"gradient_projections{words}") for line in lines), lines


def test_a_missing_trace_is_bad_input(tmp_path):
    result = compare(write_trace(tmp_path / "a"), tmp_path / "nowhere")
    assert result.returncode == 2 and "nowhere" in result.stderr


def test_terms_outside_the_package_are_compared_before_their_sum(tmp_path):
    term, other = torch.zeros(2, 1, 2, dtype=torch.float64), torch.ones(2, 1, 2, dtype=torch.float64)
    first = write_trace(tmp_path / "a", my_term=term, reward=term.clone())
    result = compare(first, write_trace(tmp_path / "b", my_term=other, reward=other.clone()))
    assert [line.partition("[")[0] for line in result.stdout.splitlines()] == ["my_term", "reward"]
    result = compare(first, write_trace(tmp_path / "c", reward=term.clone()))
    assert result.returncode == 1 and result.stdout.startswith("my_term: only in")
