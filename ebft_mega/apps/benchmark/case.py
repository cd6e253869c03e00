"""Benchmark cases: the model sizes, and the geometry of one comparison (row length, samples, stride)."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.config.input_keys import DataConfig, ModelConfig
from ebft_mega.config.schema import (
    EbftConfig,
    LearnConfig,
    Reuse,
    RunConfig,
    TrainConfig,
    ZeroConfig,
)

NOWHERE = Path("unused")  # a benchmark reads no dataset and writes no run directory


@dataclass(frozen=True)
class BenchModel:
    """The model that all sides of a comparison run: of a directory, or with random weights."""

    sizes: dict[str, Any]  # under Hugging Face's names
    dtype: Literal["bfloat16", "float32"]
    # `train.attention` of this trainer's sides; the baseline's is always dense.
    attention: Literal["auto", "two_part", "flex", "dense"] = "auto"
    directory: str | None = None  # of the weights; None: they are random
    data: str | None = None  # directory of the dataset whose rows are taken; None: random tokens

    @classmethod
    def of_directory(cls, directory: Path, data: Path, dtype: Literal["bfloat16", "float32"]) -> "BenchModel":
        """A model with its weights, and rows of text for it."""
        sizes = Architecture.from_directory(directory).hf_config
        return cls(sizes, dtype, directory=str(directory), data=str(data))

    @property
    def architecture(self) -> Architecture:
        """The sizes as an `Architecture`."""
        return Architecture.from_hf(self.sizes, "benchmark")


def _qwen2(hidden: int, intermediate: int, layers: int, heads: int, groups: int, vocabulary: int, tied: bool) -> Any:
    return {
        "model_type": "qwen2",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": tied,
    }


MODELS = {
    # Small enough for a CPU; attention is a far larger share of it than of a real model.
    "toy": BenchModel(
        {
            "model_type": "llama",
            "vocab_size": 8192,
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": False,
        },
        "float32",
    ),
    # Between the toy and what people train: for a CPU, too, in float32.
    "0.2b": BenchModel(_qwen2(896, 3584, 14, 14, 2, 32000, tied=True), "float32"),
    # The sizes of Qwen2.5, for GPUs; the smallest runs on a CPU in float32 as well.
    "0.5b": BenchModel(_qwen2(896, 4864, 24, 14, 2, 151936, tied=True), "bfloat16"),
    "1.5b": BenchModel(_qwen2(1536, 8960, 28, 12, 2, 151936, tied=True), "bfloat16"),
    # Counted, never run here.
    "7b": BenchModel(_qwen2(3584, 18944, 28, 28, 4, 152064, tied=False), "bfloat16"),
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
    sides: tuple[str, ...] = ("naive", "naive_sdpa", "ours", "ours_unmerged", "ours_activations")
    temperature: float = 0.6
    rows: int = 1  # of a step; they are one micro-batch
    embed_method: str = "last_token"
    ce_coef: float = 0.0

    def config(
        self,
        model: BenchModel,
        reuse: Reuse,
        checkpoints_layers: bool = False,
        estimator: str | None = None,
        merges: bool = True,
    ) -> RunConfig:
        """Configuration of a run on one process; the benchmark sets its learning rate to 0.

        Args:
            estimator: of advantages, with inner products of features as they are; None: `rloo` with whitened rewards.
        """
        objective: dict[str, Any] = {}
        if estimator is not None:
            objective = {"advantage_estimator": estimator, "alignment": "inner_product", "use_whitening": False}
        return RunConfig(
            output_dir=NOWHERE,
            model=ModelConfig(init_from=Path(model.directory)) if model.directory else ModelConfig(config=model.sizes),
            data=DataConfig(shards=NOWHERE, sequence_length=self.sequence_length),
            ebft=EbftConfig(
                stride=self.stride,
                context_length=self.context_length,
                generate_max_len=self.generate_length,
                n_samples_per_prompt=self.samples,
                temperature=self.temperature,
                embed_method=self.embed_method,
                ce_coef=self.ce_coef,
                merge_equal_prefixes=merges,
                **objective,
            ),
            options={"token_critic": {"warmup_batches": 1}} if estimator == "token_critic" else {},
            train=TrainConfig(
                global_batch_size=self.rows,
                micro_batch_size=self.rows,
                max_steps=1,
                dtype=model.dtype,
                attention=model.attention,
                activation_checkpointing="full" if checkpoints_layers else "none",
            ),
            zero=ZeroConfig(stage=0),
            learn=LearnConfig(reuse_rollout=reuse),
        )

    def of_two_blocks(self) -> "BenchCase":
        """The same case on the shortest row that has two blocks."""
        shortest = self.context_length + self.generate_length + self.stride
        return dataclasses.replace(self, sequence_length=shortest)
