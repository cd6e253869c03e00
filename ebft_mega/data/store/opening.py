"""Open a local or remote dataset after every check that is possible without reading documents. Imports no torch."""

import dataclasses
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ebft_mega.data.selection.text_formats import text_in_place_of_dataset
from ebft_mega.data.store.cache_folder import plain_files, remove
from ebft_mega.data.store.checks import (
    index_problems,
    manifest_problems,
    parse_manifest,
    read_manifest,
    shard_problems,
    swapped_shard_problems,
    tokenizer_problems,
)
from ebft_mega.data.store.clients import Options, store_client
from ebft_mega.data.store.dataset import Dataset
from ebft_mega.data.store.format import (
    INDEX_NAME,
    MANIFEST_LIMIT_BYTES,
    MANIFEST_NAME,
    TOKENIZER_DIRECTORY,
    Manifest,
)
from ebft_mega.data.store.index_file import load_index
from ebft_mega.data.store.reader import ShardFiles
from ebft_mega.data.store.remote import OnError, RemoteShards
from ebft_mega.data.store.shard_cache import ShardCache
from ebft_mega.data.text.file_kinds import BUILD_IT
from ebft_mega.data.tokenizers.tokenizer_files import TOKENIZER_FILES
from ebft_mega.errors import DamagedDataError, InputError, Problem, UnreachableDataError
from ebft_mega.extension.store import DEFAULT_TRANSFER, StoreClient, Transfer
from ebft_mega.io.input_errors import bad_input
from ebft_mega.io.records import MAX_PROBLEMS
from ebft_mega.registry.store_addresses import scheme_of

logger = logging.getLogger(__name__)

_TOKENIZER_LIMIT_BYTES = 1 << 28
_SIMULTANEOUS_CHECKS = 16
_SHORT_SECONDS = 3.0  # for an answer that a plan can do without
_WHAT = "dataset directory made by tools/build_shards.py"


def open_dataset(
    place: Path | str,
    cache: ShardCache | None = None,
    *,
    on_error: OnError = "raise",
    transfer: Transfer = DEFAULT_TRANSFER,
    options: Options | None = None,
) -> Dataset:
    """Open a dataset after checking everything that can be checked without reading the shards.

    Presence and size of every file, the index and its hash, the fingerprint and the tokenizer copy are checked, and
    whether local shards were swapped. Document checksums are checked at every read.

    Args:
        place: a local directory made by `tools/build_shards.py`, or the address of one (`registry.kinds.STORES`).
            Every other scheme, and `pipe:` commands, are refused.
        cache: where the files of an address are stored; not used for a local directory.
        on_error: for an address. With "raise", every read from a downloaded shard with a wrong sha256 is an error; with
            "skip", only reads of its documents with a wrong checksum are.
        transfer: timeouts, retries and redirects for the server of an address.
        options: of the stores, by their names.

    Raises:
        InputError: with all problems found.
    """
    if scheme_of(str(place)):
        return _open_remote(str(place), cache, on_error, transfer, options or {})
    directory = Path(place)
    has_manifest = (directory / MANIFEST_NAME).exists()
    text = None if has_manifest else text_in_place_of_dataset(directory)
    if not directory.is_dir():
        raise bad_input(place, "dataset", text or "no such directory", BUILD_IT if text else f"a {_WHAT}")
    if text is not None:
        raise bad_input(place, "dataset", text, BUILD_IT)
    manifest = read_manifest(directory)
    problems = manifest_problems(str(directory / MANIFEST_NAME), manifest) + tokenizer_problems(directory, manifest)
    problems += shard_problems(directory, manifest) + index_problems(directory, manifest)
    if problems:
        raise InputError(problems)
    index = load_index(directory / INDEX_NAME)
    files = ShardFiles([directory / shard.name for shard in manifest.shards])
    problems = swapped_shard_problems(directory, manifest, index, files)
    if problems:
        files.close()
        raise InputError(problems)
    return Dataset(directory, manifest, index, files)


def _open_remote(
    address: str, cache: ShardCache | None, on_error: OnError, transfer: Transfer, options: Options
) -> Dataset:
    client = store_client(address, _WHAT, transfer, options)
    if cache is None:
        raise bad_input(address, "dataset", "no directory for a cache", "one that keeps what is downloaded")
    address = _fixed(address.rstrip("/"), client)
    try:
        directory, manifest = remote_description(address, cache, client)
    except OSError as error:  # of the disk; what the server does wrong has errors of its own
        raise bad_input(cache.directory, "cache", error.strerror or error, "a directory that can be written") from error
    if problems := remote_shard_problems(address, manifest, client):
        raise InputError(problems)
    index = load_index(directory / INDEX_NAME)
    return Dataset(directory, manifest, index, RemoteShards(address, manifest, directory, cache, client, on_error))


def _fixed(address: str, client: StoreClient) -> str:
    """The address whose contents do not change any more; the log says which, where it is another one."""
    try:
        fixed = client.fixed(address)
    except DamagedDataError as error:
        raise bad_input(address, "dataset", error.found, error.expected) from error
    if fixed != address:
        logger.info("%s is %s", address, fixed)
    return fixed


def remote_absence(address: str, transfer: Transfer, options: Options | None = None) -> str | None:
    """Why there is no remote dataset, as far as it is seen from here: no answer, or no manifest. One short attempt.

    Args:
        address: of the dataset directory.
        transfer: whose redirects are followed.
        options: of the stores, by their names.

    Returns:
        What was found, in words; None where there is a manifest, or an answer that says that something is wrong.
    """
    quick = dataclasses.replace(transfer, timeout_seconds=_SHORT_SECONDS, attempts=1)
    try:
        client = store_client(address, _WHAT, quick, options or {})
    except InputError as error:  # what the store needs is not installed
        return f"{error.problems[0].found} ({error.problems[0].expected})"
    try:
        place = client.fixed(address.rstrip("/"))
        content = client.small_file(f"{place}/{MANIFEST_NAME}", MANIFEST_LIMIT_BYTES, absent_if_forbidden=True)
    except UnreachableDataError as error:
        return error.found
    except DamagedDataError:
        return None
    finally:
        client.close()
    return f"no {MANIFEST_NAME}" if content is None else None


def remote_description(address: str, cache: ShardCache, client: StoreClient) -> tuple[Path, Manifest]:
    """Copy manifest, index and tokenizer of a remote dataset, unless complete copies exist.

    The manifest is fetched every time. The copies lie in a directory named by its fingerprint, so a dataset that
    changed gets new ones. One process of a node copies at a time; the others wait and use the same copy.

    Args:
        address: of the dataset directory.
        cache: of this node.
        client: to read with.

    Returns:
        The local directory, and the manifest.

    Raises:
        InputError: no manifest, a wrong one, or files that are not what it describes.
    """
    where = f"{address}/{MANIFEST_NAME}"
    content = _read_manifest(where, client)
    manifest = parse_manifest(content, where)
    # The fingerprint becomes the name of the directory, and the sizes are downloaded, so they are checked first.
    if problems := manifest_problems(where, manifest):
        raise InputError(problems)
    directory = cache.dataset_directory(manifest.fingerprint)
    with cache.lock(manifest.fingerprint):
        if _description_problems(directory, content, manifest):
            num_bytes = len(content) + manifest.index.bytes
            room = cache.make_room_for_description(manifest.fingerprint, num_bytes)
            if room < num_bytes:
                found = f"manifest and index of {num_bytes} bytes, and room for {room} in {cache.directory}"
                expected = "a larger data.cache_gigabytes (--cache-gigabytes), which holds at least these"
                raise bad_input(where, "index.bytes", found, expected)
            incoming = directory.with_suffix(".incoming")
            try:
                incoming.mkdir()
                _copy_description(address, incoming, content, manifest, client, room)
                problems = _description_problems(incoming, content, manifest)
                if problems:
                    raise InputError([problem.within(address) for problem in problems])
                remove(directory)
                incoming.rename(directory)
            except DamagedDataError as error:
                raise bad_input(error.shard, Path(error.shard).name, error.found, error.expected) from error
            finally:
                remove(incoming)
    return directory, manifest


def remote_shard_problems(address: str, manifest: Manifest, client: StoreClient) -> list[Problem]:
    """Report shards that are missing, unreachable or of another size; requests only their sizes, 16 at a time.

    After `MAX_PROBLEMS` no others are asked for: each of them may take as long as a server that hangs.
    """
    found_problems: list[Problem] = []

    def problem(shard: int) -> Problem | None:
        if len(found_problems) >= MAX_PROBLEMS:
            return None
        entry = manifest.shards[shard]
        url, expected = f"{address}/{entry.name}", f"{entry.bytes} bytes"
        try:
            found = f"{client.size(url)} bytes"
        except DamagedDataError as error:
            found = error.found
        return None if found == expected else Problem(url, entry.name, found, expected)

    with ThreadPoolExecutor(_SIMULTANEOUS_CHECKS, thread_name_prefix="shard-sizes") as executor:
        for item in executor.map(problem, range(len(manifest.shards))):
            if item is not None and len(found_problems) < MAX_PROBLEMS:
                found_problems.append(item)
    return found_problems


def _read_manifest(url: str, client: StoreClient) -> bytes:
    expected = "the manifest of a dataset made by tools/build_shards.py"
    try:
        content = client.small_file(url, MANIFEST_LIMIT_BYTES)
    except DamagedDataError as error:
        is_of_size = error.expected.startswith("at most ")
        raise bad_input(url, MANIFEST_NAME, error.found, expected if is_of_size else error.expected) from error
    if content is None:
        raise bad_input(url, MANIFEST_NAME, "no such file", expected)
    return content


def _description_problems(directory: Path, manifest_content: bytes, manifest: Manifest) -> list[Problem]:
    """Report what is missing or wrong in a local copy of manifest, index and tokenizer; links are, too."""
    path = directory / MANIFEST_NAME
    if (
        plain_files(directory) is None
        or not path.is_file()
        or path.stat().st_size != len(manifest_content)
        or path.read_bytes() != manifest_content
    ):
        return [Problem(str(path), MANIFEST_NAME, "no copy", "a copy of the manifest")]
    return index_problems(directory, manifest) + tokenizer_problems(directory, manifest)


def _copy_description(
    address: str, directory: Path, manifest_content: bytes, manifest: Manifest, client: StoreClient, room_bytes: int
) -> None:
    """Download a description into a directory that has just been made; at most `room_bytes` in all."""
    num_bytes = manifest.index.bytes
    room_bytes -= len(manifest_content) + num_bytes
    with (directory / MANIFEST_NAME).open("xb") as file:
        file.write(manifest_content)
    with (directory / INDEX_NAME).open("xb") as file:
        for chunk in client.chunks(f"{address}/{INDEX_NAME}", 0, num_bytes, num_bytes):
            file.write(chunk)
    (directory / TOKENIZER_DIRECTORY).mkdir()
    for name in TOKENIZER_FILES:
        url, limit = f"{address}/{TOKENIZER_DIRECTORY}/{name}", min(_TOKENIZER_LIMIT_BYTES, room_bytes)
        content = client.small_file(url, limit, absent_if_forbidden=True)
        if content is not None:
            room_bytes -= len(content)
            with (directory / TOKENIZER_DIRECTORY / name).open("xb") as file:
                file.write(content)
