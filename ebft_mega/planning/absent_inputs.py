"""Find what a plan can be made without: datasets, tokenizers and weights that are not there yet. No torch.

What is there, in part or damaged, is no part of it: it is checked as ever.
"""

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ebft_mega.checkpoint.model_folder import is_checkpoint
from ebft_mega.config.paths import StoredModel
from ebft_mega.config.schema import RunConfig
from ebft_mega.data.store.opening import remote_absence
from ebft_mega.data.tokenizers.tokenizer_files import TOKENIZER_FILES
from ebft_mega.errors import InputError, Problem
from ebft_mega.extension.store import Transfer
from ebft_mega.io.contained_files import read_contained_json
from ebft_mega.io.expanded_paths import REPOSITORY
from ebft_mega.io.input_errors import file_obstacle
from ebft_mega.planning.datasets import holds_text, text_tokenizer
from ebft_mega.planning.model_files import CONFIG_NAME, CheckedModel, check_model, random_model
from ebft_mega.registry.store_addresses import address_problem

# One folder per published model, named as directories of its weights are.
MODEL_CONFIGS = REPOSITORY / "configs" / "models"
MODEL_KEYS = ("model.init_from", "ebft.feature_model")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
_MODEL = "a Hugging Face model directory: config.json, *.safetensors and the tokenizer"
_DATASET = "a dataset directory made by tools/build_shards.py, or a directory of text shards"
_NOTHING, _EMPTY = "no such directory", "an empty directory"


@dataclass(frozen=True)
class AbsentInput:
    """An input that is to be supplied before a start."""

    key: str
    place: str  # path or URL
    found: str
    expected: str
    stand_in: Path | None = None  # file whose sizes a model is planned with; None: it is no model
    own_words: str = ""  # in place of the others

    @property
    def words(self) -> str:
        """What is to be supplied, in one line without the key."""
        return self.own_words or f"{self.place}: {self.found}; expected {self.expected}"

    @property
    def stand_in_words(self) -> str:
        """The file whose sizes a model is planned with, short where it lies in the repository; empty: no model."""
        if self.stand_in is None:
            return ""
        is_own = self.stand_in.is_relative_to(REPOSITORY)
        return str(self.stand_in.relative_to(REPOSITORY) if is_own else self.stand_in)


def absent_inputs(config: RunConfig) -> dict[str, AbsentInput]:
    """List what a run reads and is not there, by key.

    Servers of remote datasets are asked once each for the dataset's manifest, for a few seconds at most.
    """
    found = [*_absent_models(config), *_absent_data(config), *_absent_checkpoint(config)]
    return {entry.key: entry for entry in found}


def models_to_download(config: RunConfig) -> dict[str, AbsentInput]:
    """Models in stores of which a plan has the small files only, by key."""
    models = zip(MODEL_KEYS, (config.model.init_from, config.ebft.feature_model), strict=True)
    return {
        key: AbsentInput(key, str(model), "", "", model / CONFIG_NAME, f"nothing: {model.to_download}")
        for key, model in models
        if isinstance(model, StoredModel) and model.to_download
    }


def plan_model(entry: AbsentInput, feature_layers: tuple[float, ...] | None = None) -> CheckedModel:
    """Describe a model whose weights are to be supplied, by its own `config.json` or else by that of its stand-in.

    Args:
        entry: of the key that names it.
        feature_layers: as in `check_model`.
    Raises:
        InputError: neither is there, or it cannot be used.
    """
    directory, stand_in = Path(entry.place), entry.stand_in
    assert stand_in is not None, "called only for models"
    if stand_in.parent == directory:
        return check_model(directory, feature_layers, has_weights=False)
    if file_obstacle(stand_in) is not None:
        expected = f"{_MODEL}; to plan without it, its config.json in that directory or as {entry.stand_in_words}"
        raise InputError([Problem(str(directory), "model", entry.found, expected)])
    content = read_contained_json(stand_in.parent, stand_in.name, "the config.json of a model")
    model = random_model(content, str(stand_in))
    # A tokenizer that is there is compared with the data's.
    return replace(model, directory=directory) if _has_tokenizer(directory) else model


def _absent_models(config: RunConfig) -> Iterator[AbsentInput]:
    for key, directory in zip(MODEL_KEYS, (config.model.init_from, config.ebft.feature_model), strict=True):
        if directory is None or (found := lack_of_weights(directory)) is None:
            continue
        has_config = os.path.lexists(directory / CONFIG_NAME)
        stand_in = directory / CONFIG_NAME if has_config else MODEL_CONFIGS / directory.name / CONFIG_NAME
        address = directory.address if isinstance(directory, StoredModel) else ""
        words = f"nothing: {address} is not asked for its sizes; a start downloads it" if address else ""
        yield AbsentInput(key, str(directory), found, _MODEL, stand_in, words)


def lack_of_weights(directory: Path) -> str | None:
    """Why a model directory has no weights at all, in words; None if it has some or is something else."""
    if (nothing := _nothing_there(directory)) is not None:
        return nothing
    try:
        has_some = is_checkpoint(directory) or any(any(directory.glob(pattern)) for pattern in _WEIGHTS)
    except OSError:
        return None  # the check says why
    return None if has_some or not directory.is_dir() else "no weights"


def _nothing_there(directory: Path) -> str | None:
    """Why there is nothing at a path, in words: no directory of the name, or an empty one; None if there is."""
    try:
        return None if any(True for _ in directory.iterdir()) else _EMPTY
    except FileNotFoundError:
        return _NOTHING
    except OSError:
        return None  # a file, or nothing that may be read: the check says so


def _absent_data(config: RunConfig) -> Iterator[AbsentInput]:
    """Datasets that are not there, text that no tokenizer is there for, and that tokenizer."""
    needs_tokenizer = False
    for key, place in dataset_places(config).items():
        if isinstance(place, str):
            found = _no_answer(config, place)
            if found is not None:
                yield AbsentInput(key, place, found, "a dataset made by tools/build_shards.py")
            continue
        found = _nothing_there(place)
        if found is None and holds_text(place):
            tokenizer = text_tokenizer(config)
            if tokenizer is None or _has_tokenizer(tokenizer):
                continue
            found = "text shards, whose tokens cannot be counted without their tokenizer"
            yield AbsentInput(key, str(place), found, f"a tokenizer in {tokenizer}")
            needs_tokenizer = True
        elif found is not None:
            yield AbsentInput(key, str(place), found, _DATASET)
            needs_tokenizer = True
    directory = config.data.tokenizer
    if needs_tokenizer and directory is not None and not _has_tokenizer(directory):
        expected = "a tokenizer directory, for text shards"
        yield AbsentInput("data.tokenizer", str(directory), _nothing_there(directory) or "no tokenizer", expected)


def dataset_places(config: RunConfig) -> dict[str, Path | str]:
    """Where the training datasets and the held-out one are, by key: local paths and URLs."""
    places: dict[str, Path | str] = {
        config.data.source_key(name): source.shards for name, source in config.data.named_sources.items()
    }
    if config.evaluation.shards is not None:
        places["evaluation.shards"] = config.evaluation.shards
    return places


def _no_answer(config: RunConfig, address: str) -> str | None:
    """Why a remote dataset cannot be asked for its manifest, in words; None if it can, or if the check says more."""
    if address_problem(address) is not None:
        return None
    transfer = Transfer(redirect_hosts=config.data.redirect_hosts)
    return remote_absence(address, transfer, config.options)


def _has_tokenizer(directory: Path) -> bool:
    return any(os.path.lexists(directory / name) for name in TOKENIZER_FILES)


def _absent_checkpoint(config: RunConfig) -> Iterator[AbsentInput]:
    resume = config.checkpoint.resume
    if resume not in ("auto", "never") and (found := _nothing_there(Path(resume))) is not None:
        yield AbsentInput("checkpoint.resume", resume, found, "the directory of a checkpoint or of a run")


def listed_keys(entries: Collection[AbsentInput]) -> str:
    """Keys of absent inputs as a subject with its verb: `data.shards is`, `data.shards and evaluation.shards are`."""
    *others, last = [entry.key for entry in entries]
    return f"{', '.join(others)} and {last} are" if others else f"{last} is"
