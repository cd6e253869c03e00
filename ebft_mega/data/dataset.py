"""Random access to the documents of an opened dataset. Imports neither torch nor webdataset."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ebft_mega.data.format import TOKENIZER_DIRECTORY, Manifest
from ebft_mega.data.reader import ShardFiles, read_member
from ebft_mega.errors import DamagedDataError


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
            expected, found = f"token ids below {self.manifest.vocab_size}", str(int(stored.max()))
            raise DamagedDataError(str(shard_path), int(record["offset"]), expected, found, number)
        tokens = np.empty(stored.size + 1, np.int64)
        tokens[:-1] = stored
        tokens[-1] = self.manifest.eos_id
        return tokens

    def close(self) -> None:
        """Closes the shard files."""
        self.files.close()
