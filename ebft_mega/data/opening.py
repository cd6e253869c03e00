"""Opening a dataset directory: everything that can be checked before a document is read. Imports no torch."""

import re
from pathlib import Path

import numpy as np

from ebft_mega.data.checks import (
    index_problems,
    manifest_problems,
    read_manifest,
    shard_problems,
    swapped_shard_problems,
)
from ebft_mega.data.dataset import Dataset
from ebft_mega.data.format import INDEX_NAME
from ebft_mega.data.inputs import bad_input
from ebft_mega.data.reader import ShardFiles
from ebft_mega.errors import InputError

_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*:")
_WHAT = "dataset directory made by tools/build_shards.py"


def open_dataset(path: Path | str) -> Dataset:
    """Opens a dataset directory after checking everything that can be checked without reading the shards.

    Presence and size of every file, the index hash, the fingerprint and the tokenizer copy are checked, and
    whether a shard stands in another one's place. Document checksums are checked at every read.

    Args:
        path: a local directory made by `tools/build_shards.py`. URLs and `pipe:` commands are refused.

    Raises:
        InputError: with all problems found.
    """
    directory = Path(path)
    if _URL.match(str(path)):
        raise bad_input(path, "dataset", "a URL or a command", f"a local {_WHAT}")
    if not directory.is_dir():
        raise bad_input(path, "dataset", "no such directory", f"a {_WHAT}")
    manifest = read_manifest(directory)
    problems = manifest_problems(directory, manifest) + shard_problems(directory, manifest)
    problems += index_problems(directory, manifest)
    if problems:
        raise InputError(problems)
    index = np.load(directory / INDEX_NAME, mmap_mode="r", allow_pickle=False)
    files = ShardFiles([directory / shard.name for shard in manifest.shards])
    problems = swapped_shard_problems(directory, manifest, index, files)
    if problems:
        files.close()
        raise InputError(problems)
    return Dataset(directory, manifest, index, files)
