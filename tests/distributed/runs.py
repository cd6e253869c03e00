"""Run whole trainings on gloo ranks, through `run_training` itself, and compare what they write."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from ebft_mega.apps.report.run_report import write_run_report
from ebft_mega.checkpoint.commit import CHECKPOINTS
from ebft_mega.checkpoint.tensor_index import INDEX_NAME, TensorIndex
from ebft_mega.checkpoint.tensors import CheckpointTensors
from ebft_mega.config.load import load_config
from ebft_mega.data.builder.dataset_build import build_dataset
from ebft_mega.data.tokenizers.tokenizer import load_tokenizer
from ebft_mega.data.tokenizers.tokenizer_training import train_tokenizer
from ebft_mega.lifecycle.run import run_training
from ebft_mega.lifecycle.setting_aside import Fresh
from ebft_mega.parallel.groups import connect
from ebft_mega.planning.run_plan import check_run
from ebft_mega.runtime.stop_requests import Signals
from tests.overrides import last_of_each

TEXT = """
output_dir: unused
seed: 11
model:
  config: {model_type: %s, vocab_size: 300, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 4,
           num_attention_heads: 4, num_key_value_heads: 2, head_dim: 8, tie_word_embeddings: %s,
           initializer_range: 0.2}
data: {shards: unused, sequence_length: 24, workers: 0}
evaluation: {shards: unused, interval: 4, rows: 3}
ebft: {stride: 4, context_length: 4, generate_max_len: 4, n_samples_per_prompt: 3, temperature: 0.8, ce_coef: 0.3}
train: {global_batch_size: 4, micro_batch_size: 1, max_steps: 6, lr: 3.0e-3, dtype: float32, grad_clip: 0.5,
        weight_decay: 0.1}
"""
# What depends on the machine and not on the run.
UNREPEATABLE = ("perf/", "memory/")


@dataclass(frozen=True)
class Setting:
    """A layout, a precision and a model."""

    data: int
    tensor: int
    pipeline: int
    overrides: tuple[str, ...] = ()
    model_type: str = "llama"
    tied: bool = True

    @property
    def ranks(self) -> int:
        return self.data * self.tensor * self.pipeline

    def __str__(self) -> str:
        options = [option.split("=")[-1] for option in self.overrides]
        return "-".join([f"{self.data}{self.tensor}{self.pipeline}", *options, self.model_type])


def make_datasets(directory: Path) -> None:
    """Datasets `train` and `held_out` of pseudo-random words, with their tokenizer."""
    generator = np.random.default_rng(3)
    words = ["".join(generator.choice(list("abcdefgh"), size=4)) for _ in range(60)]
    for split, documents in (("train", 40), ("held_out", 6)):
        (directory / "text" / split).mkdir(parents=True)
        for index in range(documents):
            text = " ".join(generator.choice(words, size=int(generator.integers(10, 60))))
            (directory / "text" / split / f"{index}.py").write_text(text + "\n")
    train_tokenizer(directory / "text" / "train", 300, directory / "tokenizer")
    for split in ("train", "held_out"):
        build_dataset(directory / "text" / split, load_tokenizer(directory / "tokenizer"), directory / split)


def run(directory: str, name: str, setting: Setting, overrides: tuple[str, ...] = (), fresh: bool = False) -> int:
    """One run into `directory/name`, on the data in `directory`; to be called in every rank.

    Args:
        fresh: with `--fresh`.
    Returns:
        The exit code.
    """
    connect()
    root = Path(directory)
    path = root / f"{name}-{dist.get_rank()}.yaml"
    path.write_text(TEXT % (setting.model_type, str(setting.tied).lower()))
    wanted = (
        f"output_dir={root / name}",
        f"data.shards={root / 'train'}",
        f"evaluation.shards={root / 'held_out'}",
        f"data.cache={root / 'cache'}",
        f"parallel.tensor_parallel_size={setting.tensor}",
        f"parallel.pipeline_parallel_size={setting.pipeline}",
    )
    config = load_config(path, last_of_each(*wanted, *setting.overrides, *overrides))
    plan = check_run(config, dist.get_world_size())
    return run_training(config, plan, None, Signals(), time.monotonic(), write_run_report, Fresh.of(fresh, ()))


def lines(output: Path) -> list[dict]:
    """What the metrics say of every step, without what depends on the machine."""
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(UNREPEATABLE)} for line in found]


def tensors(folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Every tensor of a checkpoint, whole, by kind and name."""
    index = TensorIndex.from_json((folder / INDEX_NAME).read_text(), "test")
    source = CheckpointTensors(folder, index)
    return {
        (kind, name): source.part(kind, name, tuple(slice(0, size) for size in indexed.shape))
        for kind, named in index.kinds.items()
        for name, indexed in named.items()
    }


def checkpoint(output: Path, step: int) -> Path:
    """Folder of a run's checkpoint."""
    return output / CHECKPOINTS / f"step-{step:08d}"


def assert_equal_tensors(first: Path, second: Path) -> None:
    """Two checkpoints hold the same bits."""
    ours, theirs = tensors(first), tensors(second)
    assert ours.keys() == theirs.keys() and len(ours) > 3
    different = [key for key in ours if not torch.equal(ours[key], theirs[key])]
    assert different == []
