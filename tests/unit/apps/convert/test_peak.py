"""How much memory a conversion takes: what it says, whatever the size of the model."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.tensor_shapes import hf_shapes
from ebft_mega.model.weights.model_directory import write_model
from ebft_mega.model.weights.weight_sources import RandomWeights
from tests.conftest import tiny_config
from tests.unit.written_checkpoint import write_checkpoint

REPOSITORY = Path(__file__).resolve().parents[4]
MIB = 2**20


@pytest.mark.parametrize(
    ("width", "layers", "shard_bytes"),
    [
        pytest.param(512, 7, 12 * MIB, id="100 MB"),
        pytest.param(1024, 6, 64 * MIB, id="340 MB", marks=pytest.mark.slow),
    ],
)
def test_the_peak_is_at_most_the_largest_tensor_and_one_file(tmp_path, width, layers, shard_bytes):
    """Resident memory, pages of mapped files included; the model is many times as large."""
    sizes = {"hidden_size": width, "intermediate_size": 11 * width // 4, "num_hidden_layers": layers}
    heads = {"vocab_size": 4 * width, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": width // 16}
    architecture = Architecture.from_hf(tiny_config("llama", tied=False, **sizes, **heads), "test")
    shapes = hf_shapes(architecture)
    largest = 4 * max(torch.Size(shape).numel() for shape in shapes.values())
    whole = 4 * architecture.num_parameters

    class Ones(RandomWeights):
        def tensor(self, name):
            return torch.ones(shapes[name])

    source = Ones(architecture, 1)
    tensors = ((name, source.tensor(name)) for name in shapes)
    write_model(tmp_path / "hf", architecture, tensors, torch.float32, shard_bytes=shard_bytes)
    write_checkpoint(tmp_path / "checkpoints", architecture, source)

    command = [sys.executable, "-m", "tests.unit.apps.convert.peak"]
    arguments = [tmp_path / "hf", tmp_path, tmp_path / "out", shard_bytes]
    result = subprocess.run([*command, *map(str, arguments)], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    importing, exporting = map(int, result.stdout.split())
    assert whole > 4 * (largest + shard_bytes), "a model that says nothing"
    assert largest / 2 < importing <= largest + shard_bytes
    assert largest / 2 < exporting <= largest + shard_bytes
