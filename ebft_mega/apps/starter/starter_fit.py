"""Find the layout, the micro-batch and the reuse of rollouts with which a model fits a machine."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ebft_mega.apps.starter.data_sizes import DataSizes, choose_sizes
from ebft_mega.apps.starter.machine import BYTES_PER_GIGABYTE, Machine
from ebft_mega.apps.starter.starter_text import MACHINE_PROCESSES, Inputs, Layout, Settings, starter_text
from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.partition import valid_tensor_parallel_sizes
from ebft_mega.config.load import load_config
from ebft_mega.config.schema import Reuse, RunConfig
from ebft_mega.data.store.format import Manifest
from ebft_mega.errors import InputError, Problem
from ebft_mega.planning.auto import needed_bytes, possible_reuses, smallest_peak
from ebft_mega.planning.run_plan import RunPlan, check_run, plan_of_sizes

MICRO_BATCHES = (4, 2, 1)
# What the command line calls the inputs.
OPTIONS = {
    "model.init_from": "--model",
    "model.config": "--model",
    "data.shards": "--data",
    "evaluation.shards": "--held-out",
    "output_dir": "--output",
}


@dataclass(frozen=True)
class Supply:
    """What a run can read."""

    training: Manifest
    held_out: Manifest | None


@dataclass(frozen=True)
class Fitted:
    """A configuration that fits, and what it was checked with."""

    text: str
    config: RunConfig
    plan: RunPlan


@dataclass(frozen=True)
class _Draft:
    """One choice, with the bytes that it needs on an accelerator."""

    sizes: DataSizes
    layout: Layout
    reuse: Reuse
    needed: int


def fit(inputs: Inputs, architecture: Architecture, supply: Supply, machine: Machine) -> Fitted:
    """Choose the least communication that fits, then the least arithmetic, then the largest micro-batch.

    Args:
        inputs: model, data and machine as they are to be written.
        architecture: of the model.
        supply: what the datasets hold.
        machine: number of processes and memory of each.

    Raises:
        InputError: nothing fits, with what would need the least; the data is too small; model and data do not fit each
            other.
    """
    plans = _Plans(inputs, architecture)
    smallest: _Draft | None = None
    too_little_data: InputError | None = None
    for tensor, pipeline in _degrees(architecture, machine.processes):
        replicas = machine.processes // (tensor * pipeline)
        try:
            sizes = choose_sizes(architecture, supply.training, supply.held_out, replicas)
        except InputError as error:
            too_little_data = error  # the fewer replicas, the fewer rows a step needs; the last have the fewest
            continue
        for draft in _drafts(plans, sizes, tensor, pipeline, replicas):
            if draft.needed <= machine.memory_bytes:
                return _fitted(plans, draft, machine)
            if smallest is None or draft.needed < smallest.needed:
                smallest = draft
    if smallest is None:
        assert too_little_data is not None, "replicas alone divide any number of processes"
        raise too_little_data
    layout = smallest.layout
    found = (
        f"{machine.words}; the smallest plan, tensor {layout.tensor_parallel} x pipeline {layout.pipeline_parallel} x "
        f"data {layout.replicas} with learn.reuse_rollout {smallest.reuse}, needs {_gigabytes(smallest.needed)} on each"
    )
    expected = "more or larger GPUs, or a smaller model"
    if machine.is_cpu:
        expected = "a smaller model, or --gpus N --gpu-memory GB of a machine that is to train it"
    raise InputError([Problem("--model" if machine.is_cpu else "--gpu-memory", "memory", found, expected)])


@dataclass(frozen=True)
class _Plans:
    """Configurations and plans of choices for one model."""

    inputs: Inputs
    architecture: Architecture

    def of(self, settings: Settings) -> tuple[RunConfig, RunPlan]:
        """Configuration and plan; of the data nothing is read."""
        config = _read(starter_text(self.inputs, settings), self.inputs)
        return config, plan_of_sizes(config, settings.layout.processes, self.architecture)


def _read(text: str, inputs: Inputs) -> RunConfig:
    """The configuration; whatever is wrong with an input is told of the option that names it."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "starter.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path).with_places({"": str(inputs.config), **OPTIONS})


def _degrees(architecture: Architecture, processes: int) -> Iterator[tuple[int, int]]:
    """Tensor and pipeline parallel sizes, those that communicate least first."""
    # Tensor parallelism stays within a machine.
    tensors = [size for size in valid_tensor_parallel_sizes(architecture) if size <= MACHINE_PROCESSES]
    pairs = [
        (tensor, pipeline)
        for tensor in tensors
        for pipeline in range(1, architecture.num_hidden_layers + 1)
        if processes % (tensor * pipeline) == 0
    ]
    yield from sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair[1]))


def _drafts(plans: _Plans, sizes: DataSizes, tensor: int, pipeline: int, replicas: int) -> Iterator[_Draft]:
    """All choices for one pair of degrees, the best first."""
    micro_batches = [micro for micro in MICRO_BATCHES if sizes.rows_per_step % (micro * replicas) == 0]
    first, _ = plans.of(Settings(sizes, Layout(tensor, pipeline, replicas, micro_batches[0]), "off", "# memory"))
    for reuse in possible_reuses(first):
        for micro in micro_batches:
            layout = Layout(tensor, pipeline, replicas, micro)
            config, plan = plans.of(Settings(sizes, layout, reuse, "# memory"))
            yield _Draft(sizes, layout, reuse, needed_bytes(smallest_peak(config, plan, reuse)))


def _fitted(plans: _Plans, draft: _Draft, machine: Machine) -> Fitted:
    """Write the choice with the reason for it, and check it as a start would."""
    lines = [f"# Planned: {_gigabytes(draft.needed)} of {_gigabytes(machine.memory_bytes)}, a tenth of slack included."]
    config, plan = plans.of(Settings(draft.sizes, draft.layout, draft.reuse, lines[0]))
    for reuse in possible_reuses(config):
        if reuse == draft.reuse:
            break
        needed = needed_bytes(smallest_peak(config, plan, reuse))
        lines.append(f"# {reuse.capitalize()} of the rollouts would save arithmetic and need {_gigabytes(needed)}.")
    settings = Settings(draft.sizes, draft.layout, draft.reuse, "\n".join(lines))
    text = starter_text(plans.inputs, settings)
    config, _ = plans.of(settings)
    return Fitted(text, config, check_run(config, draft.layout.processes))


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / BYTES_PER_GIGABYTE:.3g} GB"
