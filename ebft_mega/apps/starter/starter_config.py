"""Write a starter configuration for what a user has."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebft_mega.apps.starter.machine import machine_for
from ebft_mega.apps.starter.starter_fit import Supply, fit
from ebft_mega.apps.starter.starter_text import Inputs
from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.data.store.format import Manifest
from ebft_mega.data.store.opening import open_dataset
from ebft_mega.errors import InputError
from ebft_mega.io.contained_files import read_contained_json
from ebft_mega.io.durable import write_bytes
from ebft_mega.planning.model_files import CONFIG_NAME, check_model, random_model

WEIGHTS = "*.safetensors"


@dataclass(frozen=True)
class Request:
    """What the user has; paths as given on the command line."""

    model: Path
    data: Path
    held_out: Path | None
    output: Path
    gpus: int | None
    gpu_gigabytes: float | None


def write_starter_config(request: Request, repository: Path) -> tuple[int, tuple[str, ...]]:
    """Write the configuration; nothing is written unless a start would accept it.

    Args:
        request: what the user has.
        repository: where the relative paths of a configuration start.

    Returns:
        The number of processes that it is for, and the notes of its plan.

    Raises:
        InputError: everything that is wrong with model, data or machine.
    """
    machine = machine_for(request.gpus, request.gpu_gigabytes)
    supply = _supply(request)
    has_weights = any(request.model.glob(WEIGHTS))
    architecture, written = _architecture(request.model, supply.training, has_weights)
    data, held_out = (path and _as_written(path, repository) for path in (request.data, request.held_out))
    assert data is not None  # a required option
    inputs = Inputs(
        name=request.output.stem,
        config=_as_written(request.output, repository),
        model=_as_written(request.model, repository) if has_weights else None,
        architecture=written,
        parameters=architecture.num_parameters,
        data=data,
        data_tokens=supply.training.tokens,
        held_out=held_out,
        machine=machine.words,
        is_cpu=machine.is_cpu,
    )
    before = Path.cwd()
    output = request.output.absolute()
    os.chdir(repository)
    try:
        fitted = fit(inputs, architecture, supply, machine)
    finally:
        os.chdir(before)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(output, fitted.text.encode("utf-8"))
    return fitted.plan.parallel.world_size, fitted.plan.notes


def _supply(request: Request) -> Supply:
    problems = []
    manifests: list[Manifest] = []
    for option, path in (("--data", request.data), ("--held-out", request.held_out)):
        if path is None:
            continue
        try:
            dataset = open_dataset(path)
        except InputError as error:
            problems += [problem.within(option) for problem in error.problems]
            continue
        dataset.close()
        manifests.append(dataset.manifest)
    if problems:
        raise InputError(problems)
    return Supply(manifests[0], manifests[1] if request.held_out is not None else None)


def _architecture(directory: Path, training: Manifest, has_weights: bool) -> tuple[Architecture, dict[str, Any]]:
    """The architecture, and its config.json for a model with random weights, which gets the data's vocabulary."""
    if has_weights:
        return check_model(directory).architecture, {}
    config = read_contained_json(directory, CONFIG_NAME, "a model's configuration")
    config = {key: value for key, value in config.items() if not key.startswith(("_", "torch_dtype", "transformers"))}
    config |= {"vocab_size": training.vocab_size, "eos_token_id": training.eos_id}
    config.pop("bos_token_id", None)
    return random_model(config, str(directory / CONFIG_NAME)).architecture, config


def _as_written(path: Path, repository: Path) -> Path:
    """A path from the repository root if it lies there, else from the root of all."""
    whole = path.absolute()
    return whole.relative_to(repository) if whole.is_relative_to(repository) else whole
