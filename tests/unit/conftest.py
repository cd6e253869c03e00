"""A model directory and two small datasets that a configuration can point at; no torch is needed for them."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.tensor_shapes import hf_shapes
from ebft_mega.data.builder.shard_writer import DatasetWriter
from ebft_mega.data.tokenizers.tokenizer import tokenizer_sha256

MODEL_FIELDS = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


@dataclasses.dataclass(frozen=True)
class FakeTokenizer:
    """What a dataset writer asks of a tokenizer."""

    files: tuple[Path, ...]
    vocab_size: int
    eos_id: int = 0
    bos_id: int | None = None

    @property
    def sha256(self) -> str:
        """Hash of the tokenizer's file."""
        return str(tokenizer_sha256(self.files[0].parent))


def write_tokenizer(directory: Path, content: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(content, encoding="utf-8")


def write_dataset(directory: Path, tokenizer: Path, lengths: list[int], vocab_size: int = 90) -> None:
    """Documents of given lengths (without their end token), in small shards."""
    directory.mkdir(parents=True)
    fake = FakeTokenizer((tokenizer / "tokenizer.json",), vocab_size)
    writer = DatasetWriter(directory, fake, shard_bytes=4096)
    for number, length in enumerate(lengths):
        writer.add(np.arange(length) % vocab_size, {"path": f"{number}.py"})
    writer.finish()


def write_weights(directory: Path, **changes) -> None:
    """Weights of the model of MODEL_FIELDS, changed by name; all are ones."""
    shapes = hf_shapes(Architecture.from_hf(MODEL_FIELDS | changes, "test"))
    directory.mkdir(parents=True, exist_ok=True)
    save_file({tensor: np.ones(shape, np.float32) for tensor, shape in shapes.items()}, directory / "model.safetensors")


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Paths of a model and of two datasets, and a configuration that uses them."""

    root: Path
    model_fields = MODEL_FIELDS

    def add_tokenizer(self, name: str, content: str) -> None:
        """Write (or replace) a tokenizer in a folder of this name."""
        write_tokenizer(self.root / name, content)

    def add_dataset(self, name: str, tokenizer: str, lengths: list[int]) -> None:
        """Write one more dataset."""
        write_dataset(self.root / name, self.root / tokenizer, lengths)

    @property
    def tree(self) -> dict:
        """A valid configuration."""
        return {
            "output_dir": str(self.root / "run"),
            "model": {"init_from": str(self.root / "model")},
            "data": {"shards": str(self.root / "train"), "sequence_length": 32},
            "evaluation": {"shards": str(self.root / "held_out"), "rows": 4},
            "train": {"global_batch_size": 8, "micro_batch_size": 2, "max_steps": 10},
        }

    def write(self, **changes) -> Path:
        """A configuration file; changes name dotted keys with `__` for the dot."""
        tree = self.tree
        for name, value in changes.items():
            *sections, leaf = name.split("__")
            branch = tree
            for section in sections:
                branch = branch.setdefault(section, {})
            branch[leaf] = value
        path = self.root / "run.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
        return path


@pytest.fixture(scope="session")
def made_inputs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    write_tokenizer(root / "model", '{"model": {}}')
    (root / "model" / "config.json").write_text(json.dumps(MODEL_FIELDS), encoding="utf-8")
    write_weights(root / "model")
    write_dataset(root / "train", root / "model", [100, 300, 199, 57])  # 656 + 4 tokens: 20 rows of 32 and 20
    write_dataset(root / "held_out", root / "model", [200, 77])
    return root


@pytest.fixture
def inputs(made_inputs, tmp_path) -> Inputs:
    """A copy that a test may damage."""
    shutil.copytree(made_inputs, tmp_path / "inputs")
    return Inputs(tmp_path / "inputs")
