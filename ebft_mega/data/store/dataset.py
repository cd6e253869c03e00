"""Random access to the documents of an opened dataset. Imports neither torch nor webdataset."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ebft_mega.data.store.format import TAR_BLOCK_BYTES, TOKENIZER_DIRECTORY, Manifest
from ebft_mega.data.store.reader import ShardBytes, read_member
from ebft_mega.errors import DamagedDataError


@dataclass(frozen=True)
class Dataset:
    """An opened dataset. Copies in other processes (forked or unpickled) open their own files."""

    directory: Path  # local: manifest, index and tokenizer are here, the shards maybe elsewhere
    manifest: Manifest
    index: np.ndarray  # INDEX_DTYPE [documents], memory-mapped
    files: ShardBytes = field(repr=False)

    @property
    def tokenizer_directory(self) -> Path:
        """The copy of the tokenizer that made the tokens."""
        return self.directory / TOKENIZER_DIRECTORY

    def tokens(self, number: int) -> np.ndarray:
        """Read one document and check its checksum and its token ids.

        Args:
            number: document number, 0 <= number < manifest.documents.

        Returns:
            uint16 or uint32 [tokens of the document - 1], little endian, read-only: what the shard holds, without
            the end-of-document token.

        Raises:
            IndexError: no such document.
            DamagedDataError: the shard cannot be read, the checksum differs or a token id lies outside the
                vocabulary.
        """
        manifest = self.manifest
        if not 0 <= number < manifest.documents:
            raise IndexError(f"document {number} of {manifest.documents}")
        shard, crc32, offset, payload_bytes, _ = self.index[number].item()
        member = read_member(self.files, shard, offset, payload_bytes, crc32, number)
        stored = np.frombuffer(member, "<u2" if manifest.dtype == "uint16" else "<u4", offset=TAR_BLOCK_BYTES)
        if stored.size and int(stored.max()) >= manifest.vocab_size:
            expected, found = f"token ids below {manifest.vocab_size}", str(int(stored.max()))
            raise DamagedDataError(self.files.place(shard), offset, expected, found, number)
        return stored

    def close(self) -> None:
        """Close the shard files."""
        self.files.close()
