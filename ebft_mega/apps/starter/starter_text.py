"""The text of a starter configuration: every key that a first run turns on, with the reason for its value."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebft_mega.apps.starter.data_sizes import DataSizes
from ebft_mega.config.paths import written_path
from ebft_mega.config.schema import Reuse
from ebft_mega.config.yaml_source import write_value, write_yaml

MACHINE_PROCESSES = 8  # GPUs of one machine


@dataclass(frozen=True)
class Layout:
    """How processes and rows are divided."""

    tensor_parallel: int
    pipeline_parallel: int
    replicas: int
    micro_batch: int  # rows

    @property
    def processes(self) -> int:
        """All of them."""
        return self.tensor_parallel * self.pipeline_parallel * self.replicas


@dataclass(frozen=True)
class Inputs:
    """What a starter configuration is written for."""

    name: str  # of the run
    config: Path  # the file itself, from the repository root if it lies there
    model: Path | None  # None: random weights
    architecture: dict[str, Any]  # config.json, for random weights
    parameters: int
    data: Path
    data_tokens: int
    held_out: Path | None
    machine: str  # in words
    gpu_gigabytes: float | None  # memory of each GPU; None: there is none


@dataclass(frozen=True)
class Settings:
    """What was chosen."""

    sizes: DataSizes
    layout: Layout
    reuse: Reuse
    memory: str  # what is planned for and what other choices would need, one comment line each


def starter_text(inputs: Inputs, settings: Settings) -> str:
    """Write the configuration.

    Args:
        inputs: model, data and machine.
        settings: what fits them.
    """
    parts = [
        _head(inputs, settings),
        f"output_dir: {_path(Path('runs', inputs.name))}\nseed: 0\n",
        _model(inputs),
        _data(inputs, settings),
        _evaluation(inputs, settings),
        _ebft(inputs),
        _train(inputs, settings),
        _layout(settings),
        _checkpoint(settings),
    ]
    return "\n".join(part for part in parts if part)


def _head(inputs: Inputs, settings: Settings) -> str:
    config = shlex.quote(str(inputs.config))
    options = plan_options(settings.layout.processes, inputs.gpu_gigabytes)
    start = _start(inputs, settings.layout)
    return (
        f"# Strided EBFT of a model of {inputs.parameters:,} parameters on {inputs.machine}.\n"
        f"#   {start} --config {config}\n"
        "# Written by tools/new_config.py as a start: docs/configuration.md describes every key, and\n"
        f"#   python launcher/train.py --config {config} {options}\n"
        "# prints what any change makes of plan and memory. Relative paths start at the repository root.\n"
    )


def plan_options(processes: int, gpu_gigabytes: float | None) -> str:
    """Write the options with which a dry run plans for the same machine."""
    memory = "" if gpu_gigabytes is None else f" --gpu-memory {gpu_gigabytes!r}".removesuffix(".0")
    return f"--dry-run --world-size {processes}{memory}"


def _start(inputs: Inputs, layout: Layout) -> str:
    """The command that starts so many processes."""
    processes = layout.processes
    if inputs.gpu_gigabytes is None:
        return "deepspeed launcher/train.py"
    if processes <= MACHINE_PROCESSES:
        return f"deepspeed --num_gpus {processes} launcher/train.py"
    # Equally many on each machine, and a replica's slices together.
    sizes = range(MACHINE_PROCESSES, 0, -1)
    each = next(size for size in sizes if processes % size == 0 and size % layout.tensor_parallel == 0)
    nodes = f"--nodes={processes // each}"
    if each != MACHINE_PROCESSES:
        nodes += f" --ntasks-per-node={each} --gpus-per-node={each}"
    return f"sbatch {nodes} launcher/slurm/many_nodes.sbatch"


def _path(path: Path) -> str:
    """A path as a configuration reads it back."""
    return write_value(written_path(path))


def _model(inputs: Inputs) -> str:
    if inputs.model is not None:
        return f"model:\n  init_from: {_path(inputs.model)}\n"
    nested = write_yaml({"config": inputs.architecture}).rstrip()
    fields = "\n".join(f"  {line}" for line in nested.splitlines())
    return (
        "# The directory has no weights, so they are random: of use to try things on. The features of an untrained\n"
        "# model say little, so cross-entropy has a weight of 1 below; give its hf/ directory to the next run.\n"
        f"model:\n{fields}\n"
    )


def _data(inputs: Inputs, settings: Settings) -> str:
    sizes = settings.sizes
    return (
        "data:\n"
        f"  shards: {_path(inputs.data)}  # {inputs.data_tokens:,} tokens\n"
        f"  sequence_length: {sizes.sequence_length}  # tokens of a row; {sizes.rows:,} rows in one pass\n"
    )


def _evaluation(inputs: Inputs, settings: Settings) -> str:
    if inputs.held_out is None:
        return "# No held-out data, so no evaluation: tools/build_shards.py --held-out sets some apart.\n"
    return (
        "evaluation:\n"
        f"  shards: {_path(inputs.held_out)}\n"
        f"  interval: {settings.sizes.interval}  # optimizer steps; also before the first and after the last\n"
        f"  rows: {settings.sizes.held_out_rows}\n"
    )


def _ebft(inputs: Inputs) -> str:
    cross_entropy = 0.03 if inputs.model is not None else 1.0
    reason = (
        "of the authors' values 0, 0.03 and 0.1" if inputs.model is not None else "the weights are random, see above"
    )
    return (
        "ebft:\n"
        "  stride: 8  # tokens from one anchor to the next\n"
        "  context_length: 8  # before the first anchor\n"
        "  generate_max_len: 8  # tokens of a rollout\n"
        "  n_samples_per_prompt: 4  # rollouts of an anchor\n"
        "  temperature: 0.6\n"
        "  feature_layers: [0.25, 0.5, 0.75]  # depths at which the frozen initial model is read\n"
        "  # Rewards are the authors', cosines after whitening. use_whitening: false with alignment: inner_product is\n"
        "  # feature matching itself (docs/numerics.md, Objectives).\n"
        f"  ce_coef: {cross_entropy}  # {reason}\n"
    )


def _train(inputs: Inputs, settings: Settings) -> str:
    sizes, layout = settings.sizes, settings.layout
    rate = "1e-6" if inputs.model is not None else "1e-3"
    passes = sizes.steps / max(1, sizes.steps_per_epoch)
    tokens = sizes.steps * sizes.rows_per_step * sizes.sequence_length
    return (
        "train:\n"
        f"  global_batch_size: {sizes.rows_per_step}  # rows of a step\n"
        f"  micro_batch_size: {layout.micro_batch}  # rows that a replica processes at a time\n"
        f"  max_steps: {sizes.steps}  # {tokens:,} tokens, {passes:.2f} passes over the data\n"
        f"  lr: {rate}\n"
        f"  warmup_steps: {round(sizes.steps * 0.03)}  # 3 %\n"
        f"  dtype: {'float32' if inputs.gpu_gigabytes is None else 'bfloat16'}\n"
    )


def _layout(settings: Settings) -> str:
    layout = settings.layout
    stage, reason = (3, "all states are divided over the replicas") if layout.replicas > 1 else (0, "one replica")
    return (
        f"# {_count(layout.processes, 'process', 'processes')}: {_count(layout.replicas, 'replica', 'replicas')}\n"
        "parallel:\n"
        f"  tensor_parallel_size: {layout.tensor_parallel}\n"
        f"  pipeline_parallel_size: {layout.pipeline_parallel}\n"
        f"  sequence_parallel: {str(layout.tensor_parallel > 1).lower()}\n"
        "\n"
        "zero:\n"
        f"  stage: {stage}  # {reason}\n"
        "\n"
        f"{settings.memory}\n"
        "learn:\n"
        f"  reuse_rollout: {write_value(settings.reuse)}\n"
    )


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _checkpoint(settings: Settings) -> str:
    return f"checkpoint:\n  interval: {max(1, settings.sizes.steps // 10)}  # optimizer steps\n  keep_last: 2\n"
