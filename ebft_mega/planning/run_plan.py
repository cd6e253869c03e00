"""Check a configuration against the number of processes, the model directory and the datasets. No torch."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ebft_mega.architecture.hf_config import Architecture, tapped_layers
from ebft_mega.architecture.partition import tensor_parallel_obstacles, valid_tensor_parallel_sizes
from ebft_mega.architecture.vocabulary_blocks import NUM_VOCABULARY_BLOCKS
from ebft_mega.block_plan import BlockPlan
from ebft_mega.checkpoint.commit import step_of
from ebft_mega.checkpoint.manifest import MANIFEST_NAME
from ebft_mega.config.entries import tapped_fractions
from ebft_mega.config.fields import is_possible_path
from ebft_mega.config.rules import notes
from ebft_mega.config.schema import RunConfig
from ebft_mega.errors import ConfigError, InputError, InputProblems, Problem
from ebft_mega.planning import data_budget
from ebft_mega.planning.absent_inputs import AbsentInput, absent_inputs, models_to_download, plan_model
from ebft_mega.planning.input_places import output_notes, output_problems
from ebft_mega.planning.model_data import NamedData, NamedModel, data_notes, data_problems, window_problems
from ebft_mega.planning.model_files import check_model, random_model

T = TypeVar("T")


@dataclass(frozen=True)
class ParallelSizes:
    """How many processes there are of each kind; the three multiply to the world size."""

    tensor_parallel: int
    pipeline_parallel: int
    data_parallel: int

    @property
    def world_size(self) -> int:
        """All processes."""
        return self.tensor_parallel * self.pipeline_parallel * self.data_parallel


@dataclass(frozen=True)
class RunPlan:
    """What a run will do, worked out from its configuration and its inputs before anything starts."""

    architecture: Architecture
    feature_architecture: Architecture  # of the frozen network; may have other sizes, never another vocabulary
    block_plan: BlockPlan
    parallel: ParallelSizes
    num_micro_batches: int  # per replica and optimizer step
    total_steps: int
    train_rows: data_budget.TrainingSupply | None  # None: some of the data is still to be supplied
    evaluation_rows: data_budget.HeldOutSupply | None  # None: no evaluation, or its data is still to be supplied
    notes: tuple[str, ...]  # settings that work but may surprise
    sources: tuple[data_budget.KnownSource, ...] = ()  # training data that is there
    to_be_supplied: tuple[AbsentInput, ...] = ()  # empty in every plan that a run starts with

    @property
    def data_parallel_size(self) -> int:
        """Model replicas."""
        return self.parallel.data_parallel

    def lacks(self, key: str) -> bool:
        """Whether the input that a key names is still to be supplied."""
        return any(entry.key == key for entry in self.to_be_supplied)


def check_world(config: RunConfig, world_size: int, models: Sequence[Architecture] = ()) -> ParallelSizes:
    """Divide the processes over the parallel degrees.

    Args:
        config: the run.
        world_size: number of processes.
        models: the policy and, if it is another one, the feature model; both are cut by the same degrees. None if
            they are not known.
    Raises:
        ConfigError: the degrees fit neither heads nor layers, do not multiply to the world size, or leave a batch
            that cannot be divided; each with the choices that are valid.
    """
    tensor, pipeline = config.parallel.tensor_parallel_size, config.parallel.pipeline_parallel_size
    problems: list[Problem] = []

    def refuse(key: str, found: str, expected: str) -> None:
        problems.append(Problem(config.place(key), key, found, expected))

    obstacles = dict.fromkeys(text for model in models for text in tensor_parallel_obstacles(model, tensor))
    if obstacles:
        expected = f"{_listed(_tensor_choices(models, world_size))}, as heads, widths and vocabulary allow"
        refuse("parallel.tensor_parallel_size", f"{tensor}: {', '.join(obstacles)}", expected)
    if models and pipeline > models[0].num_hidden_layers:
        found = f"{pipeline} stages for {models[0].num_hidden_layers} layers"
        refuse("parallel.pipeline_parallel_size", found, f"at most {models[0].num_hidden_layers}")

    data, left_over = divmod(world_size, tensor * pipeline)
    rows, micro = config.train.global_batch_size, config.train.micro_batch_size
    if left_over or not data:
        found = f"tensor {tensor} x pipeline {pipeline} = {tensor * pipeline} processes per replica"
        choices = _layout_choices(config, world_size, models)
        refuse("parallel", found, f"a divisor of the world size {world_size}; with this batch: {choices or 'none'}")
    elif rows % (micro * data):
        expected = f"a multiple of {micro * data} (train.micro_batch_size {micro} x data-parallel size {data})"
        choices = _layout_choices(config, world_size, models)
        refuse("train.global_batch_size", str(rows), f"{expected}, or {choices}" if choices else expected)
    if problems:
        raise ConfigError(problems)
    return ParallelSizes(tensor, pipeline, data)


def _tensor_choices(models: Sequence[Architecture], limit: int) -> list[int]:
    """Tensor-parallel sizes that every model can be cut into, up to a limit."""
    common = {size for size in range(1, limit + 1) if NUM_VOCABULARY_BLOCKS % size == 0}
    for model in models:
        common.intersection_update(valid_tensor_parallel_sizes(model))
    return sorted(common)


def _layout_choices(config: RunConfig, world_size: int, models: Sequence[Architecture]) -> str:
    """List the degrees that fit the processes, the models and the batch; empty if none do."""
    rows, micro = config.train.global_batch_size, config.train.micro_batch_size
    most_stages = models[0].num_hidden_layers if models else world_size
    choices = []
    for tensor in _tensor_choices(models, world_size):
        pipelines = [
            pipeline
            for pipeline in range(1, min(most_stages, world_size // tensor) + 1)
            if world_size % (tensor * pipeline) == 0 and rows % (micro * (world_size // (tensor * pipeline))) == 0
        ]
        if pipelines:
            choices.append(f"tensor {tensor} with pipeline {_listed(pipelines)}")
    return "; ".join(choices)


def _listed(numbers: Sequence[int]) -> str:
    """Numbers as a choice in words."""
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last


def check_run(config: RunConfig, world_size: int, without_data: bool = False) -> RunPlan:
    """Check a run against its inputs and the number of processes.

    Opens the models' and the datasets' small files; of the weights the headers and tensors that would be left out are
    checked, of the shards presence, sizes and index hashes.

    Args:
        config: the run, as `load_config` gives it.
        world_size: number of processes.
        without_data: plan without datasets, tokenizers and weights that are not there; what is there is checked.
    Raises:
        InputError: everything that is wrong, at once.
    """
    problems: list[Problem] = []

    def attempt(check: Callable[..., T], *arguments: object) -> T | None:
        """The result of a check, or None after its problems were noted."""
        try:
            return check(*arguments)
        except InputProblems as error:
            problems.extend(error.problems)
            return None

    absent = (absent_inputs(config) if without_data else {}) | models_to_download(config)
    policy = attempt(_policy, config, absent)
    features = attempt(_feature_model, config, absent) if config.ebft.feature_model else policy
    architecture = policy.model.architecture if policy else None
    feature_architecture = features.model.architecture if features else None
    # With the policy's sizes unknown, the feature model's would be taken for them.
    models = [model for model in (architecture, feature_architecture) if model] if architecture else []
    sizes = attempt(check_world, config, world_size, models)
    training, sources, held_out = _open_data(config, absent, attempt)
    if architecture and feature_architecture:
        problems += _vocabularies_differ(config, architecture, feature_architecture)
    named = [model for model in (policy, None if features is policy else features) if model]
    data = _named_data(config, sources, held_out)
    problems += [*window_problems(named, *_length(config)), *data_problems(named, data)]
    problems += [*output_problems(config), *_no_checkpoint(config, absent)]
    problems += data_budget.supply_problems(config, sources, held_out, architecture)
    if problems or not (sizes and architecture and feature_architecture):
        raise InputError(problems)
    plan = plan_of_sizes(config, world_size, architecture, feature_architecture)
    return replace(
        plan,
        train_rows=training,
        evaluation_rows=held_out,
        notes=(
            *plan.notes,
            *output_notes(config),
            *(f"{model.key}: {note}" for model in named for note in model.model.notes),
            *data_notes(named, data),
            *data_budget.supply_notes(config, training, held_out),
        ),
        sources=sources,
        to_be_supplied=tuple(absent.values()),
    )


def plan_of_sizes(
    config: RunConfig, world_size: int, architecture: Architecture, feature_architecture: Architecture | None = None
) -> RunPlan:
    """Plan a run from sizes alone, which is all that layout and memory follow from. Reads no file.

    Args:
        config: the run; what it reads is not looked at.
        world_size: number of processes.
        architecture: of the policy.
        feature_architecture: of the feature network; None: the policy's.
    Raises:
        ConfigError: the layout fits neither the models nor the batch.
    """
    models = [architecture] if feature_architecture is None else [architecture, feature_architecture]
    sizes = check_world(config, world_size, models)
    num_micro_batches = config.train.global_batch_size // (config.train.micro_batch_size * sizes.data_parallel)
    return RunPlan(
        architecture=architecture,
        feature_architecture=models[-1],
        block_plan=config.block_plan,
        parallel=sizes,
        num_micro_batches=num_micro_batches,
        total_steps=config.total_steps,
        train_rows=None,
        evaluation_rows=None,
        notes=(
            *notes(config),
            *_length_notes(config, architecture),
            *_pipeline_notes(config, sizes, num_micro_batches, models[-1]),
        ),
    )


def _open_data(
    config: RunConfig, absent: Mapping[str, AbsentInput], attempt: Callable[..., Any]
) -> tuple[data_budget.TrainingSupply | None, tuple[data_budget.KnownSource, ...], data_budget.HeldOutSupply | None]:
    """The rows of the run, unless some are to be supplied; the training data that is there; the held-out rows.

    Args:
        attempt: gives the result of a check, or None after its problems were noted.
    """
    if absent.keys().isdisjoint(map(config.data.source_key, config.data.named_sources)):
        training = attempt(data_budget.training_supply, config)
        sources = training.sources if training else ()
    else:
        training, sources = None, attempt(data_budget.known_sources, config, absent) or ()
    has_held_out = config.evaluation.shards is not None and "evaluation.shards" not in absent
    return training, sources, attempt(data_budget.held_out_supply, config) if has_held_out else None


def _named(config: RunConfig, key: str, problems: tuple[Problem, ...] | list[Problem]) -> list[Problem]:
    """Problems of a file with the configuration key that led to it."""
    return [problem.within(f"{config.place(key)}: {key}") for problem in problems]


def _length(config: RunConfig) -> tuple[str, str, int]:
    """The key of the length of rows, its place, and the length."""
    key = "data.sequence_length"
    return key, config.place(key), config.data.sequence_length


def _policy(config: RunConfig, absent: Mapping[str, AbsentInput]) -> NamedModel:
    if config.model.init_from is not None:
        return _model_directory(config, "model.init_from", config.model.init_from, absent)
    key = "model.config"
    assert config.model.config is not None, "load_config lets no other configuration pass"
    return NamedModel(key, config.place(key), random_model(config.model.config, config.place(key)))


def _feature_model(config: RunConfig, absent: Mapping[str, AbsentInput]) -> NamedModel:
    directory, key = config.ebft.feature_model, "ebft.feature_model"
    assert directory is not None, "called only with a feature model"
    return _model_directory(config, key, directory, absent, tapped_fractions(config))


def _model_directory(
    config: RunConfig,
    key: str,
    directory: Path,
    absent: Mapping[str, AbsentInput],
    feature_layers: tuple[float, ...] | None = None,
) -> NamedModel:
    """A model directory that can be used; of a feature model only the layers up to the deepest one that is read."""
    where = config.place(key)
    if key not in absent and not directory.exists():
        raise InputError([Problem(where, key, f"no directory {directory}", "a Hugging Face model directory")])
    try:
        model = plan_model(absent[key], feature_layers) if key in absent else check_model(directory, feature_layers)
        return NamedModel(key, where, model)
    except InputProblems as error:
        raise InputError(_named(config, key, error.problems)) from None


def _named_data(
    config: RunConfig, sources: Sequence[data_budget.KnownSource], held_out: data_budget.HeldOutSupply | None
) -> tuple[NamedData, ...]:
    """All datasets that could be opened, under their keys."""
    supplies: list[tuple[str, data_budget.KnownSource | data_budget.HeldOutSupply]] = []
    supplies += [(source.key, source) for source in sources]
    supplies += [("evaluation.shards", held_out)] if held_out else []
    return tuple(
        NamedData(key, config.place(key), supply.manifest, supply.tokenizer_directory) for key, supply in supplies
    )


def _vocabularies_differ(config: RunConfig, policy: Architecture, features: Architecture) -> list[Problem]:
    if policy.vocab_size == features.vocab_size:
        return []
    key = "ebft.feature_model"
    found = f"a vocabulary of {features.vocab_size} tokens"
    return [Problem(config.place(key), key, found, f"{policy.vocab_size} tokens, as the policy has")]


def _no_checkpoint(config: RunConfig, absent: Mapping[str, AbsentInput]) -> list[Problem]:
    resume = config.checkpoint.resume
    if resume in ("auto", "never") or "checkpoint.resume" in absent:
        return []
    key, expected = "checkpoint.resume", "auto, never or the directory of a checkpoint or of a run"
    if not is_possible_path(resume) or not Path(resume).is_dir():
        return [Problem(config.place(key), key, f"{resume!r}, which is no directory", expected)]
    if step_of(Path(resume).name) is not None and not os.path.lexists(Path(resume, MANIFEST_NAME)):
        found = f"{resume!r}, which has no {MANIFEST_NAME}: its writing was not finished"
        return [Problem(config.place(key), key, found, expected)]
    return []


def _length_notes(config: RunConfig, architecture: Architecture) -> list[str]:
    if config.data.sequence_length <= architecture.max_position_embeddings:
        return []
    return [
        f"data.sequence_length {config.data.sequence_length} is longer than the model's "
        f"max_position_embeddings {architecture.max_position_embeddings}."
    ]


def _pipeline_notes(
    config: RunConfig, sizes: ParallelSizes, num_micro_batches: int, features: Architecture
) -> list[str]:
    """What a long pipeline costs."""
    stages, found = sizes.pipeline_parallel, []
    if num_micro_batches < stages:
        decoding = round(100 * (stages - num_micro_batches) / stages)
        learning = round(100 * (stages - 1) / (num_micro_batches + stages - 1))
        found.append(
            f"A replica has fewer micro-batches ({num_micro_batches}) than pipeline stages ({stages}): a stage is "
            f"idle for {decoding} % of the rollout phase and {learning} % of the gradient pass."
        )
    depth = tapped_layers(tapped_fractions(config), features.num_hidden_layers)[-1]
    if config.uses_rollouts and depth < stages:
        found.append(f"The feature network has {depth} layers for {stages} pipeline stages: the last have none.")
    return found
