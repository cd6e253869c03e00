"""Write a starter configuration for what a user has."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebft_mega.apps.starter.data_sizes import FEWEST_HELD_OUT_ROWS, HELD_OUT_ROWS
from ebft_mega.apps.starter.machine import machine_for
from ebft_mega.apps.starter.starter_fit import Supply, fit
from ebft_mega.apps.starter.starter_text import Inputs, plan_options
from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.config.schema import RunConfig
from ebft_mega.data.store.format import Manifest
from ebft_mega.data.store.opening import open_dataset
from ebft_mega.errors import InputError, InputProblems, Problem
from ebft_mega.io.contained_files import read_contained_json
from ebft_mega.io.durable import write_bytes
from ebft_mega.planning.absent_inputs import lack_of_weights
from ebft_mega.planning.model_files import CONFIG_NAME, check_model, random_model


@dataclass(frozen=True)
class Request:
    """What the user has; paths as given on the command line."""

    model: Path
    data: Path
    held_out: Path | None
    output: Path
    gpus: int | None
    gpu_gigabytes: float | None


@dataclass(frozen=True)
class Written:
    """What is to be said of a configuration that was written."""

    plan_options: str  # with which a dry run plans for the same machine
    notes: tuple[str, ...]


def write_starter_config(request: Request, repository: Path) -> Written:
    """Write the configuration; nothing is written unless a start would accept it.

    Args:
        request: what the user has.
        repository: where the relative paths of a configuration start.

    Raises:
        InputError: everything that is wrong with model, data or machine.
    """
    _refuse_unwritable(request, repository)
    machine = machine_for(request.gpus, request.gpu_gigabytes)
    supply = _supply(request)
    lack = lack_of_weights(request.model) if os.path.lexists(request.model / CONFIG_NAME) else None
    architecture, written = _architecture(request.model, supply.training, lack is None)
    output = request.output.absolute()
    inputs = Inputs(
        name=request.output.stem,
        config=_from_repository(output, repository),
        model=request.model.absolute() if lack is None else None,
        architecture=written,
        parameters=architecture.num_parameters,
        data=request.data.absolute(),
        data_tokens=supply.training.tokens,
        held_out=request.held_out and request.held_out.absolute(),
        machine=machine.words,
        gpu_gigabytes=machine.gpu_gigabytes,
    )
    before = Path.cwd()
    os.chdir(repository)
    try:
        fitted = fit(inputs, architecture, supply, machine)
    finally:
        os.chdir(before)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(output, fitted.text.encode("utf-8"))
    notes = (*_held_out_notes(request, fitted.config), *fitted.plan.notes)
    if lack is not None:
        notes = (f"{request.model}: {lack}: the model is random, with the vocabulary of the data", *notes)
    return Written(plan_options(machine.processes, machine.gpu_gigabytes), notes)


def _held_out_notes(request: Request, config: RunConfig) -> Iterator[str]:
    """Say that the held-out data is too little for the usual evaluation."""
    rows = config.evaluation.rows
    if request.held_out is None or rows >= HELD_OUT_ROWS:
        return
    worth = "" if rows >= FEWEST_HELD_OUT_ROWS else ", whose figures say next to nothing"
    yield (
        f"{request.held_out}: it holds {rows} whole rows of {config.data.sequence_length} tokens{worth}, where "
        f"{HELD_OUT_ROWS} are usual: a larger --held-out of tools/build_shards.py sets more apart"
    )


def _refuse_unwritable(request: Request, repository: Path) -> None:
    """Refuse names that the file cannot hold: it is UTF-8, and the path of it stands in comments.

    The repository's own place is written nowhere.
    """
    problems = []
    given = {"--model": request.model, "--data": request.data, "--held-out": request.held_out}
    for option, path in (given | {"--output": request.output}).items():
        try:
            text = str(_from_repository(path, repository) if path else "").encode("utf-8").decode("utf-8")
        except UnicodeEncodeError:
            problems.append(Problem(option, "path", str(path), "a path in UTF-8, as configurations are"))
            continue
        if option == "--output" and not text.isprintable():
            problems.append(Problem(option, "path", repr(text), "a path on one line, without control characters"))
    if problems:
        raise InputError(problems)


def _from_repository(path: Path, repository: Path) -> Path:
    whole = path.absolute()
    return whole.relative_to(repository) if whole.is_relative_to(repository) else whole


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
        try:
            return check_model(directory).architecture, {}
        except InputProblems as error:
            raise InputError([problem.within("--model") for problem in error.problems]) from None
    config = read_contained_json(directory, CONFIG_NAME, "a model's configuration")
    config = {key: value for key, value in config.items() if not key.startswith(("_", "torch_dtype", "transformers"))}
    config |= {"vocab_size": training.vocab_size, "eos_token_id": training.eos_id}
    config.pop("bos_token_id", None)
    return random_model(config, str(directory / CONFIG_NAME)).architecture, config
