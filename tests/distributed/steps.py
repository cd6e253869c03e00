"""What the ranks of the layout tests do: a few steps of several cases, one after another, with the real trainer."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.vocabulary_blocks import HEAD_ROWS
from ebft_mega.config.load import load_config
from ebft_mega.config.schema import RunConfig
from ebft_mega.lifecycle.build import build_trainer
from ebft_mega.model import head
from ebft_mega.model.weights.gradient_projections import GradientProjections
from ebft_mega.model.weights.stage_weights import hf_tensors
from ebft_mega.parallel.groups import ProcessGroups, connect, make_process_groups
from ebft_mega.rollout import generate
from ebft_mega.train.step import train_step
from ebft_mega.train.step_metrics import step_metrics
from ebft_mega.types import TokenBatch
from tests.overrides import last_of_each

GLOBAL_BATCH = 4
MASKING = "data.document_masking=true"
# A token critic that is used from the second step on.
CRITIC = (
    *("ebft.advantage_estimator=token_critic", "ebft.use_whitening=false", "ebft.alignment=inner_product"),
    *("ebft.embed_method=mean_pooling", "options.token_critic.warmup_batches=1", "options.token_critic.rank=8"),
)
NUM_STEPS = 3
LEARNING_RATE = 1e-3

# Five layers are uneven over two and over four stages; 131 tokens are no multiple of anything; with four
# tensor-parallel ranks two of them share a key-value head. At this temperature about one in twelve nodes of the
# rollouts' forest is shared, in some rows more than in others.
TEXT = """
output_dir: unused
seed: 11
model:
  config: {model_type: %s, vocab_size: 131, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 5,
           num_attention_heads: 4, num_key_value_heads: 2, head_dim: 8, tie_word_embeddings: %s,
           initializer_range: 0.2}
data: {shards: unused, sequence_length: 24}
ebft: {stride: 4, context_length: 4, generate_max_len: 4, n_samples_per_prompt: 3, temperature: 0.4, ce_coef: 0.3}
train: {global_batch_size: 4, micro_batch_size: 1, max_steps: 3, lr: 3.0e-3, dtype: float32, grad_clip: 0.5}
"""


@dataclass(frozen=True)
class Case:
    """A configuration by its difference to the text above."""

    name: str
    overrides: tuple[str, ...] = ()
    model_type: str = "llama"
    tied: bool = True
    head_rows: int = HEAD_ROWS  # of a chunk of the head
    filler: tuple[int, ...] = ()  # rows of every global batch in the place of damaged ones


@dataclass(frozen=True)
class Layout:
    """How the ranks share the work."""

    data: int
    tensor: int
    pipeline: int
    zero_stage: int = 3
    sequence_parallel: bool = False

    @property
    def world_size(self) -> int:
        return self.data * self.tensor * self.pipeline

    @property
    def overrides(self) -> tuple[str, ...]:
        """As configuration keys."""
        return (
            f"parallel.tensor_parallel_size={self.tensor}",
            f"parallel.pipeline_parallel_size={self.pipeline}",
            f"parallel.sequence_parallel={str(self.sequence_parallel).lower()}",
            f"zero.stage={self.zero_stage}",
        )

    def __str__(self) -> str:
        text = f"dp{self.data}-tp{self.tensor}-pp{self.pipeline}"
        text += f"-zero{self.zero_stage}" if self.zero_stage != 3 else ""
        return text + ("-sp" if self.sequence_parallel else "")


@dataclass
class Outcome:
    """What a case left behind on one rank."""

    metrics: list[dict[str, float]] = field(default_factory=list)
    projections: list[list[float]] = field(default_factory=list)  # of the gradient, by step
    rollouts: list[Tensor] = field(default_factory=list)  # this replica's, per step
    grams: list[Tensor] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)  # whole, under their Hugging Face names
    by_step: list[dict[str, Tensor]] = field(default_factory=list)  # the same after every step, where asked for


def config_of(case: Case, directory: str, overrides: tuple[str, ...] = ()) -> RunConfig:
    """The case's configuration."""
    path = Path(directory) / f"{case.name}-{dist.get_rank()}.yaml"
    path.write_text(TEXT % (case.model_type, str(case.tied).lower()), encoding="utf-8")
    return load_config(path, last_of_each(*case.overrides, *overrides))


# First tokens of the documents in each row of a global batch. The last two rows, which are a replica of their own
# where there are two, hold fewer blocks than the others; over the steps the rows change their places within a half.
DOCUMENT_STARTS = ((0, 9), (0,), (0, 4, 5, 18), tuple(range(0, 24, 3)))


def rows_of_step(step: int, groups: ProcessGroups, case: Case | None = None) -> TokenBatch:
    """This replica's slice of a step's global batch of made-up rows; masked and damaged as the case says."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(0, 131, (GLOBAL_BATCH, 24), generator=generator)
    documents = torch.zeros_like(tokens)
    for row in range(GLOBAL_BATCH):
        documents[row ^ (step % 2), list(DOCUMENT_STARTS[row])] = 1
    indices = torch.arange(GLOBAL_BATCH)
    if case is not None:
        damaged = list(case.filler)
        tokens[damaged], documents[damaged], indices[damaged] = 0, 0, -1
    local = slice(
        GLOBAL_BATCH * groups.data_parallel_rank // groups.data_parallel_size,
        GLOBAL_BATCH * (groups.data_parallel_rank + 1) // groups.data_parallel_size,
    )
    rows = TokenBatch(tokens[local], documents[local].cumsum(dim=1), indices[local])
    return rows.with_document_masking() if case is not None and MASKING in case.overrides else rows


def run_cases(layout: Layout, cases: tuple[Case, ...], directory: str, every_step: bool = False) -> dict[str, Outcome]:
    """Run every case for a few steps; the first rank returns its parameters after every step, if asked to."""
    device = connect()
    if layout.sequence_parallel:
        # megatron-core's sequence-parallel mappings allocate on `torch.cuda.current_device()`, whatever the input is.
        torch.cuda.current_device = lambda: device
    groups = make_process_groups(device, layout.tensor, layout.pipeline)
    return {case.name: run_case(layout, case, directory, groups, every_step) for case in cases}


def run_case(layout: Layout, case: Case, directory: str, groups: ProcessGroups, every_step: bool = False) -> Outcome:
    """A few steps of one case."""
    config = config_of(case, directory, layout.overrides)
    assert config.model.config is not None
    head.HEAD_ROWS = generate.HEAD_ROWS = case.head_rows
    architecture = Architecture.from_hf(config.model.config, "test")
    trainer = build_trainer(config, architecture, architecture, groups)
    outcome = Outcome()
    for step in range(NUM_STEPS):
        projections = GradientProjections(trainer.stage)
        result = train_step(trainer, rows_of_step(step, groups, case), step, LEARNING_RATE, projections.look)
        outcome.projections.append(projections.total())
        outcome.metrics.append(step_metrics(trainer, result, LEARNING_RATE))
        if result.experiences:
            outcome.rollouts.append(torch.cat([item.rollout.tokens for item in result.experiences]))
            outcome.grams.append(torch.cat([item.gram for item in result.experiences]))
        if every_step:
            parameters = whole_parameters(trainer)
            outcome.by_step += [parameters] if dist.get_rank() == 0 else []
    outcome.parameters = whole_parameters(trainer)
    return outcome


def whole_parameters(trainer) -> dict[str, Tensor]:
    """Copies of the whole model's master weights, under their Hugging Face names."""
    return {name: value.clone() for name, value in hf_tensors(local_parameters(trainer), trainer.stage)}


def local_parameters(trainer):
    """Detached master weights of this rank's slices."""
    return ((name, parameter.detach()) for name, parameter in trainer.engine.local_parameters())
