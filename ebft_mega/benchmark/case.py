"""What is compared: one toy model on rows of several lengths, sample numbers and strides."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebft_mega.config.schema import (
    DataConfig,
    EbftConfig,
    LearnConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    ZeroConfig,
)
from ebft_mega.cost.ours import Reuse
from ebft_mega.model.architecture import Architecture

NOWHERE = Path("unused")  # a benchmark reads no dataset and writes no run directory
# Small enough for a CPU; attention is a far larger share of it than of a real model.
TOY_MODEL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
# The size that exact counts are also given for; weights are never made.
LARGE_MODEL: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class BenchCase:
    """One geometry, the sides that are compared on it, and how often each runs."""

    name: str
    sequence_length: int
    samples: int = 4
    stride: int = 8
    context_length: int = 8
    generate_length: int = 8
    runs: int = 5
    sides: tuple[str, ...] = ("naive", "naive_sdpa", "ours", "ours_activations")

    def config(self, model: dict[str, Any], reuse: Reuse) -> RunConfig:
        """A run of one row per step in float32 on one process, whose learning rate the benchmark sets to 0."""
        return RunConfig(
            output_dir=NOWHERE,
            model=ModelConfig(config=model),
            data=DataConfig(shards=NOWHERE, sequence_length=self.sequence_length),
            ebft=EbftConfig(
                stride=self.stride,
                context_length=self.context_length,
                generate_max_len=self.generate_length,
                n_samples_per_prompt=self.samples,
            ),
            train=TrainConfig(global_batch_size=1, max_steps=1, dtype="float32"),
            zero=ZeroConfig(stage=0),
            learn=LearnConfig(reuse_rollout=reuse),
        )

    def of_two_blocks(self) -> "BenchCase":
        """The same on the shortest row that has two blocks."""
        shortest = self.context_length + self.generate_length + self.stride
        return dataclasses.replace(self, sequence_length=shortest)


def architecture_of(model: dict[str, Any]) -> Architecture:
    """The sizes of a model given in Hugging Face's names."""
    return Architecture.from_hf(model, "benchmark")
