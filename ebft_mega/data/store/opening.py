"""Open a local or remote dataset after every check that is possible without reading documents. Imports no torch."""

import re
from pathlib import Path

from ebft_mega.data.store.addresses import https_address_problem
from ebft_mega.data.store.checks import (
    index_problems,
    load_index,
    manifest_problems,
    read_manifest,
    shard_problems,
    swapped_shard_problems,
    tokenizer_problems,
)
from ebft_mega.data.store.dataset import Dataset
from ebft_mega.data.store.format import INDEX_NAME, MANIFEST_NAME
from ebft_mega.data.store.https import DEFAULT_TRANSFER, HttpsClient, Transfer
from ebft_mega.data.store.reader import ShardFiles
from ebft_mega.data.store.remote import OnError, RemoteShards, remote_description, remote_shard_problems
from ebft_mega.data.store.shard_cache import ShardCache
from ebft_mega.errors import InputError
from ebft_mega.io.input_errors import bad_input

_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*:")
_WHAT = "dataset directory made by tools/build_shards.py"


def open_dataset(
    place: Path | str,
    cache: ShardCache | None = None,
    *,
    on_error: OnError = "raise",
    transfer: Transfer = DEFAULT_TRANSFER,
) -> Dataset:
    """Open a dataset after checking everything that can be checked without reading the shards.

    Presence and size of every file, the index and its hash, the fingerprint and the tokenizer copy are checked, and
    whether local shards were swapped. Document checksums are checked at every read.

    Args:
        place: a local directory made by `tools/build_shards.py`, or the https URL of one. Every other scheme, and
            `pipe:` commands, are refused.
        cache: where the files of a URL are stored; not used for a local directory.
        on_error: for a URL. With "raise", every read from a downloaded shard with a wrong sha256 is an error; with
            "skip", only reads of its documents with a wrong checksum are.
        transfer: timeouts, retries and redirects for the server of a URL.

    Raises:
        InputError: with all problems found.
    """
    if _URL.match(str(place)):
        return _open_remote(str(place), cache, on_error, transfer)
    directory = Path(place)
    if not directory.is_dir():
        raise bad_input(place, "dataset", "no such directory", f"a {_WHAT}")
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


def _open_remote(address: str, cache: ShardCache | None, on_error: OnError, transfer: Transfer) -> Dataset:
    found = https_address_problem(address)
    if found is not None:
        # The address may hold a password, so it is not repeated.
        scheme = address.partition(":")[0]
        raise bad_input(f"{scheme}:...", "dataset", f"a URL or a command with {found}", f"a local or https {_WHAT}")
    if cache is None:
        raise bad_input(address, "dataset", "no directory for a cache", "one that keeps what is downloaded")
    address = address.rstrip("/")
    client = HttpsClient(transfer)
    try:
        directory, manifest = remote_description(address, cache, client)
    except OSError as error:  # of the disk; what the server does wrong has errors of its own
        raise bad_input(cache.directory, "cache", error.strerror or error, "a directory that can be written") from error
    problems = manifest_problems(f"{address}/{MANIFEST_NAME}", manifest)
    problems += remote_shard_problems(address, manifest, client)
    if problems:
        raise InputError(problems)
    index = load_index(directory / INDEX_NAME)
    return Dataset(directory, manifest, index, RemoteShards(address, manifest, directory, cache, client, on_error))
