"""Copy models from stores into the cache before a run reads them. Imports no torch.

Only the files that a model directory is made of are asked for, by their names: nothing is listed, and neither code nor
pickles are downloaded. A copy is a directory named by what it holds, so one that a run reads never changes.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebft_mega.config.paths import StoredModel
from ebft_mega.config.schema import RunConfig
from ebft_mega.data.store.cache_folder import opened_folder, plain_files, remove
from ebft_mega.data.store.clients import store_client
from ebft_mega.data.store.shard_cache import ShardCache
from ebft_mega.data.tokenizers.tokenizer_files import LONGEST_BYTES, TOKENIZER_FILES
from ebft_mega.errors import DamagedDataError, InputError, Problem
from ebft_mega.extension.store import StoreClient, Transfer
from ebft_mega.io.input_errors import bad_input
from ebft_mega.io.json_text import parse_json
from ebft_mega.io.parse_boundary import reading

logger = logging.getLogger(__name__)

CONFIG_NAME, INDEX_NAME, SINGLE_NAME = "config.json", "model.safetensors.index.json", "model.safetensors"
# Beside the weights; each may be missing.
DESCRIBING_NAMES = (
    *("generation_config.json", "chat_template.jinja", "chat_template.json", "vocab.txt"),
    *TOKENIZER_FILES,
)
MODELS = "models"  # folder of the cache
_WEIGHTS = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}\.safetensors")
_MOST_WEIGHTS = 10_000
_SIMULTANEOUS = 16
_WHAT = "Hugging Face model directory"
_GIGABYTE = 1e9


@dataclass(frozen=True)
class _ModelFile:
    """A file of a model in a store."""

    name: str
    num_bytes: int
    version: str  # what its server calls the contents, or their sha256; empty where neither is known


def with_local_models(config: RunConfig, weights: bool = True) -> RunConfig:
    """A configuration whose models in stores are copies on this machine.

    One process of a machine downloads at a time; the others wait, and read the same copy.

    Args:
        config: as `load_config` gives it.
        weights: false for a plan: only the small files are copied, unless there is a whole copy already.
    Raises:
        InputError: a model that is not there, cannot be read, or has no room.
    """
    init_from = _local(config, "model.init_from", config.model.init_from, weights)
    feature_model = _local(config, "ebft.feature_model", config.ebft.feature_model, weights)
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"init_from": init_from}),
            "ebft": config.ebft.model_copy(update={"feature_model": feature_model}),
        }
    )


def _local(config: RunConfig, key: str, place: Path | None, weights: bool) -> Path | None:
    if not isinstance(place, StoredModel) or not place.address:
        return place
    cache = ShardCache(config.data.cache, 0)  # models are not part of its limit
    transfer = Transfer(redirect_hosts=config.data.redirect_hosts)
    try:
        client = store_client(place.address, _WHAT, transfer, config.options)
        try:
            return copied_model(place.address, cache, client, weights)
        finally:
            client.close()
    except DamagedDataError as error:
        name = error.shard.rpartition("/")[2]
        problem = Problem(error.shard, name, error.found, error.expected)
        raise InputError([problem.within(f"{config.place(key)}: {key}")]) from error
    except InputError as error:
        raise InputError([problem.within(f"{config.place(key)}: {key}") for problem in error.problems]) from None
    except OSError as error:
        found = f"{error.filename or cache.directory}: {error.strerror or error}"
        raise bad_input(config.place(key), key, found, "a data.cache that can be written, with room") from error


def copied_model(address: str, cache: ShardCache, client: StoreClient, weights: bool) -> StoredModel:
    """Copy a model, unless there is a whole copy of what the store has now.

    Args:
        address: of the model directory.
        cache: whose directory holds the copies, below `models`.
        client: to read with.
        weights: false: without them, unless a whole copy is there.
    Raises:
        InputError, DamagedDataError: no model, or no usable answers.
        OSError: of the disk.
    """
    fixed = client.fixed(address.rstrip("/"))
    files = [*_describing_files(fixed, client), *_weight_files(fixed, client)]
    parts = [fixed, *sorted((each.name, each.num_bytes, each.version) for each in files)]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    name = re.sub("[^A-Za-z0-9._-]", "-", StoredModel.of(address).name)[:100]
    folder = cache.directory / MODELS
    whole, described = folder / f"{name}-{digest[:16]}", folder / f"{name}-{digest[:16]}.described"
    with cache.lock(digest):
        if not _is_whole(whole, files):
            wanted = files if weights else [each for each in files if not _WEIGHTS.fullmatch(each.name)]
            if not (_is_whole(described, wanted) and not weights):
                _copy(fixed, whole if weights else described, wanted, client)
        if _is_whole(whole, files):
            logger.info("%s is %s, copied to %s", address, fixed, whole)
            return StoredModel(whole).at(address)
    num_bytes = sum(each.num_bytes for each in files)
    words = f"a start downloads {len(files)} files, {num_bytes / _GIGABYTE:.3g} GB, of {fixed} to {whole}"
    return StoredModel(described).at(address, words)


def _describing_files(address: str, client: StoreClient) -> Iterator[_ModelFile]:
    """What lies beside the weights."""
    content = client.small_file(f"{address}/{CONFIG_NAME}", LONGEST_BYTES[".json"])
    if content is None:
        raise bad_input(f"{address}/{CONFIG_NAME}", CONFIG_NAME, "no such file", f"a {_WHAT}")
    yield _ModelFile(CONFIG_NAME, len(content), hashlib.sha256(content).hexdigest())

    def look(name: str) -> _ModelFile | None:
        # Most servers tell "missing" from "refused" by the answer for the contents only.
        content = client.small_file(f"{address}/{name}", LONGEST_BYTES[Path(name).suffix], absent_if_forbidden=True)
        return None if content is None else _ModelFile(name, len(content), hashlib.sha256(content).hexdigest())

    with ThreadPoolExecutor(_SIMULTANEOUS, thread_name_prefix="model-files") as executor:
        yield from filter(None, executor.map(look, DESCRIBING_NAMES))


def _weight_files(address: str, client: StoreClient) -> list[_ModelFile]:
    """The weights and their index."""
    place = f"{address}/{INDEX_NAME}"
    content = client.small_file(place, LONGEST_BYTES[".json"], absent_if_forbidden=True)
    found = [] if content is None else [_ModelFile(INDEX_NAME, len(content), hashlib.sha256(content).hexdigest())]
    names = [SINGLE_NAME] if content is None else _names_of_weights(content, place)

    def look(name: str) -> _ModelFile:
        url = f"{address}/{name}"
        return _ModelFile(name, client.size(url), client.version(url))

    with ThreadPoolExecutor(_SIMULTANEOUS, thread_name_prefix="model-files") as executor:
        return [*found, *executor.map(look, names)]


def _names_of_weights(content: bytes, place: str) -> list[str]:
    expected = "the index of safetensors files beside it"
    with reading(place, INDEX_NAME, expected):
        fields = parse_json(content.decode("utf-8"))
    weights = fields.get("weight_map") if isinstance(fields, dict) else None
    names = set(weights.values()) if isinstance(weights, dict) else set[Any]()
    wrong = [name for name in names if not (isinstance(name, str) and _WEIGHTS.fullmatch(name))]
    if wrong or not 0 < len(names) <= _MOST_WEIGHTS:
        found = f"the file {wrong[0]!r:.200}" if wrong else f"{len(names)} files"
        raise bad_input(place, "weight_map", found, expected)
    return sorted(names)


def _is_whole(directory: Path, files: list[_ModelFile]) -> bool:
    """Whether a directory holds these files with these sizes, and no links; their hashes were checked or recorded."""
    found = plain_files(directory, depth=1)
    if found is None or len(found) != len(files):
        return False
    paths = [directory / each.name for each in files]
    sizes = [path.stat().st_size if path.is_file() else None for path in paths]
    return sizes == [each.num_bytes for each in files]


def _copy(address: str, directory: Path, files: list[_ModelFile], client: StoreClient) -> None:
    """Download files into a directory that appears when it is whole, and record their hashes beside it.

    Raises:
        DamagedDataError: other contents than were there a moment before.
        InputError: the disk has no room.
        OSError: of the disk.
    """
    with opened_folder(directory.parent):
        pass  # no link in its place
    needed, free = sum(each.num_bytes for each in files), shutil.disk_usage(directory.parent).free
    if needed > free:
        found = f"{needed / _GIGABYTE:.3g} GB, and {free / _GIGABYTE:.3g} GB free in {directory.parent}"
        raise bad_input(address, "model", found, "room for its files in data.cache")
    incoming = directory.with_name(f"{directory.name}.incoming")
    remove(incoming)
    hashes: dict[str, str] = {}
    try:
        incoming.mkdir()
        for each in files:
            hashes[each.name] = _download(f"{address}/{each.name}", incoming / each.name, each, client)
        record: Mapping[str, object] = {"address": address, "sha256": hashes}
        text = incoming / "download.json"
        text.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        text.replace(directory.with_name(f"{directory.name}.json"))
        remove(directory)
        incoming.rename(directory)
    finally:
        remove(incoming)


def _download(url: str, path: Path, expected: _ModelFile, client: StoreClient) -> str:
    """Copy one file and return its sha256; where that is its version, it must be."""
    digest = hashlib.sha256()
    with path.open("xb") as file:
        for chunk in client.chunks(url, 0, expected.num_bytes, expected.num_bytes):
            digest.update(chunk)
            file.write(chunk)
    sha256 = digest.hexdigest()
    if len(expected.version) == len(sha256) and expected.version != sha256:
        raise DamagedDataError(url, None, f"sha256 {expected.version}", f"sha256 {sha256}")
    return sha256
