"""Opening a dataset directory, and random access to its documents. Imports neither torch nor webdataset."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ebft_mega.data.checks import (
    index_problems,
    manifest_problems,
    read_manifest,
    shard_problems,
    swapped_shard_problems,
)
from ebft_mega.data.format import INDEX_NAME, TOKENIZER_DIRECTORY, Manifest
from ebft_mega.data.inputs import bad_input
from ebft_mega.data.reader import ShardFiles, read_member
from ebft_mega.errors import DamagedDataError, InputError

_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*:")
_WHAT = "dataset directory made by tools/build_shards.py"


@dataclass(frozen=True)
class Dataset:
    """An opened dataset. Copies in other processes (forked or unpickled) open their own files."""

    directory: Path
    manifest: Manifest
    index: np.ndarray  # INDEX_DTYPE [documents], memory-mapped
    files: ShardFiles = field(repr=False)

    @property
    def tokenizer_directory(self) -> Path:
        """The copy of the tokenizer that made the tokens."""
        return self.directory / TOKENIZER_DIRECTORY

    def read_document(self, number: int) -> np.ndarray:
        """Reads one document and checks its checksum and its token ids.

        Args:
            number: document number, 0 <= number < manifest.documents.

        Returns:
            int64 [tokens of the document], the end-of-document token last.

        Raises:
            IndexError: no such document.
            DamagedDataError: the checksum differs or a token id lies outside the vocabulary.
        """
        if not 0 <= number < self.manifest.documents:
            raise IndexError(f"document {number} of {self.manifest.documents}")
        record = self.index[number]
        shard_path = self.directory / self.manifest.shards[int(record["shard"])].name
        payload = read_member(self.files, shard_path, record, number)
        stored = np.frombuffer(payload, np.dtype(self.manifest.dtype).newbyteorder("<"))
        if stored.size and int(stored.max()) >= self.manifest.vocab_size:
            raise DamagedDataError(
                f"{shard_path}: offset {int(record['offset'])}: document {number}: expected token ids below "
                f"{self.manifest.vocab_size}, found {int(stored.max())}"
            )
        tokens = np.empty(stored.size + 1, np.int64)
        tokens[:-1] = stored
        tokens[-1] = self.manifest.eos_id
        return tokens

    def close(self) -> None:
        """Closes the shard files."""
        self.files.close()


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
