"""Open, mix and pack the datasets that a configuration names. No torch."""

from collections.abc import Collection
from fractions import Fraction
from pathlib import Path

from ebft_mega.config.input_keys import DataConfig
from ebft_mega.config.schema import RunConfig
from ebft_mega.data.builder.on_demand import tokenized_dataset
from ebft_mega.data.builder.worker_pool import available_cores
from ebft_mega.data.rows.stream import RowStream, Source
from ebft_mega.data.store.dataset import Dataset
from ebft_mega.data.store.format import MANIFEST_NAME
from ebft_mega.data.store.opening import open_dataset
from ebft_mega.data.store.shard_cache import ShardCache
from ebft_mega.errors import InputError, Problem
from ebft_mega.extension.store import Transfer

BYTES_PER_GIGABYTE = 1e9


def open_training_rows(config: RunConfig, leaving_out: Collection[str] = ()) -> RowStream:
    """Open the training rows of a run, in their order.

    Args:
        leaving_out: keys of sources that are not opened, never of all; rows are then those of the others alone.
    Raises:
        InputError: everything that is wrong with any of the sources.
    """
    data = config.data
    problems: list[Problem] = []
    sources: list[Source] = []
    for name, source in data.named_sources.items():
        if data.source_key(name) in leaving_out:
            continue
        try:
            dataset = open_place(config, data.source_key(name), source.shards)
        except InputError as error:
            problems += error.problems
            continue
        # Through its text, 0.7 is seven tenths; the binary number is not.
        sources.append(Source(name, dataset, Fraction(str(source.weight)), source.max_epochs))
    if not problems:
        try:
            return RowStream(sources, data.sequence_length, config.seed)
        except InputError as error:
            key = data.mixture_key
            problems += [problem.within(f"{config.place(key)}: {key}") for problem in error.problems]
    for opened in sources:
        opened.dataset.close()
    raise InputError(problems)


def open_place(config: RunConfig, key: str, place: Path | str) -> Dataset:
    """Open the dataset that a key names.

    Text shards are tokenized first, once; remote datasets are read through the cache.

    Args:
        key: dotted key, for messages.
        place: local directory or address.
    Raises:
        InputError: everything that is wrong with it, with the key.
    """
    try:
        if isinstance(place, Path) and holds_text(place):
            tokenizer = _require_text_tokenizer(config)
            place = tokenized_dataset(place, tokenizer, config.data.cache, available_cores())
        transfer = Transfer(redirect_hosts=config.data.redirect_hosts)
        cache, on_error = shard_cache(config.data), config.data.on_error
        return open_dataset(place, cache, on_error=on_error, transfer=transfer, options=config.options)
    except InputError as error:
        raise InputError([problem.within(f"{config.place(key)}: {key}") for problem in error.problems]) from None
    except OSError as error:
        found = f"{error.filename}: {error.strerror}"
        raise InputError([Problem(config.place(key), key, found, "files that can be read")]) from None


def shard_cache(data: DataConfig) -> ShardCache:
    """Describe the cache for shards of remote datasets; nothing is allocated until one is read."""
    return ShardCache(data.cache, int(data.cache_gigabytes * BYTES_PER_GIGABYTE))


def holds_text(directory: Path) -> bool:
    """Whether a directory holds webdataset shards that `tools/build_shards.py` did not make."""
    return not (directory / MANIFEST_NAME).exists() and any(directory.glob("*.tar"))


def text_tokenizer(config: RunConfig) -> Path | None:
    """Name the directory of the tokenizer for text shards; None if no key names one."""
    return config.data.tokenizer or config.model.init_from


def _require_text_tokenizer(config: RunConfig) -> Path:
    """The tokenizer for text shards.

    Raises:
        InputError: none is named.
    """
    directory = text_tokenizer(config)
    if directory is None:
        expected = "a tokenizer directory: these shards have no dataset.json and there is no model.init_from"
        raise InputError([Problem(config.place("data.tokenizer"), "data.tokenizer", "not set", expected)])
    return directory
