"""What the ranks of the data-parallel tests do: a few steps of several cases, one after another."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ebft_mega.config.load import load_config
from ebft_mega.config.schema import RunConfig
from ebft_mega.model.architecture import Architecture
from ebft_mega.parallel.groups import ProcessGroups, connect, make_process_groups
from ebft_mega.train.run import build_trainer
from ebft_mega.train.step import train_step
from ebft_mega.train.summary import step_metrics
from ebft_mega.types import TokenBatch

GLOBAL_BATCH = 4
NUM_STEPS = 3
LEARNING_RATE = 3e-3

TEXT = """
output_dir: unused
seed: 11
model:
  config: {model_type: %s, vocab_size: 131, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 4,
           num_attention_heads: 4, num_key_value_heads: 2, head_dim: 8, tie_word_embeddings: true,
           initializer_range: 0.2}
data: {shards: unused, sequence_length: 24}
ebft: {stride: 4, context_length: 4, generate_max_len: 4, n_samples_per_prompt: 3, temperature: 0.8, ce_coef: 0.3}
train: {global_batch_size: 4, micro_batch_size: 1, max_steps: 3, lr: 3.0e-3, dtype: float32, grad_clip: 0.5}
"""


@dataclass(frozen=True)
class Case:
    """A configuration by its difference to the text above."""

    name: str
    overrides: tuple[str, ...] = ()
    model_type: str = "llama"


CASES = (
    Case("plain"),
    Case("two rows a micro-batch", ("train.micro_batch_size=2",)),
    Case("checkpointing", ("train.activation_checkpointing=full",)),
    Case("cross-entropy only", ("ebft.rl_coef=0", "ebft.ce_coef=1")),
    Case("rollouts only", ("ebft.ce_coef=0", "train.grad_clip=0", "train.weight_decay=0.1")),
    Case("top_p and mean pooling", ("ebft.top_p=0.9", "ebft.embed_method=mean_pooling"), "qwen3"),
    Case("bfloat16", ("train.dtype=bfloat16",), "qwen2"),
)


@dataclass
class Outcome:
    """What a case left behind on one rank."""

    metrics: list[dict[str, float]] = field(default_factory=list)
    rollouts: list[Tensor] = field(default_factory=list)  # this rank's, per step
    parameters: dict[str, Tensor] = field(default_factory=dict)


def config_of(case: Case, directory: str) -> RunConfig:
    """The case's configuration."""
    from pathlib import Path

    path = Path(directory) / f"{case.name}-{connect_rank()}.yaml"
    path.write_text(TEXT % case.model_type, encoding="utf-8")
    return load_config(path, case.overrides)


def connect_rank() -> int:
    """This process's rank."""
    import torch.distributed as dist

    return dist.get_rank()


def rows_of_step(step: int, groups: ProcessGroups) -> TokenBatch:
    """This rank's slice of a step's global batch of made-up rows."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(0, 131, (GLOBAL_BATCH, 24), generator=generator)
    indices = torch.arange(GLOBAL_BATCH)
    local = slice(
        GLOBAL_BATCH * groups.data_parallel_rank // groups.data_parallel_size,
        GLOBAL_BATCH * (groups.data_parallel_rank + 1) // groups.data_parallel_size,
    )
    return TokenBatch(tokens[local], torch.zeros_like(tokens[local]), indices[local])


def run_cases(cases: tuple[Case, ...], directory: str) -> dict[str, Outcome]:
    """Run every case for a few steps with the real trainer."""
    groups = make_process_groups(connect())
    return {case.name: run_case(case, directory, groups) for case in cases}


def run_case(case: Case, directory: str, groups: ProcessGroups) -> Outcome:
    """A few steps of one case."""
    config = config_of(case, directory)
    assert config.model.config is not None
    architecture = Architecture.from_hf(config.model.config, "test")
    trainer = build_trainer(config, architecture, architecture, groups)
    outcome = Outcome()
    for step in range(NUM_STEPS):
        result = train_step(trainer, rows_of_step(step, groups), step, LEARNING_RATE)
        outcome.metrics.append(step_metrics(trainer, result, LEARNING_RATE))
        if result.experiences:
            outcome.rollouts.append(torch.cat([item.rollout.tokens for item in result.experiences]))
    outcome.parameters = {name: value.clone() for name, value in trainer.engine.full_parameters()}
    return outcome
