"""Write a dataset directory. The same documents and tokenizer give the same bytes every time."""

import contextlib
import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ebft_mega.data.builder.array_files import write_array
from ebft_mega.data.builder.unit_files import TokenizedUnit, load_unit_index, unit_directory
from ebft_mega.data.store.format import (
    BOS_FORMAT_VERSION,
    FORMAT_NAME,
    FORMAT_VERSION,
    INDEX_DTYPE,
    INDEX_NAME,
    MANIFEST_NAME,
    TAR_BLOCK_BYTES,
    TOKENIZER_DIRECTORY,
    Manifest,
    document_key,
    file_sha256,
    fingerprint,
    payload_suffix,
    shard_name,
    token_dtype,
)
from ebft_mega.data.tokenizers.tokenizer import Tokenizer, copy_tokenizer
from ebft_mega.io.input_errors import bad_input

# Rows are shuffled within windows of whole shards, so a shard of tiny documents is closed early.
MAX_SHARD_DOCUMENTS = 65_536


@dataclass(frozen=True)
class WrittenShards:
    """Finished shards."""

    entries: list[dict[str, Any]]  # `ShardEntry` fields
    index: np.ndarray  # INDEX_DTYPE [documents]; `shard` counts from the first of these shards
    max_token_id: int


class ShardWriter:
    """Write documents into webdataset shards `shard-000000.tar`, ...

    Memory: one document, and about 2 kB for each document of the shard being written.

    Args:
        directory: an existing, empty directory.
        tokenizer: made the token ids that will be added.
        shard_bytes: a shard is closed once it holds at least this many bytes.
        first_document: number of the first document in its dataset.
        max_documents: a shard is closed once it holds this many documents.
    """

    def __init__(
        self,
        directory: Path,
        tokenizer: Tokenizer,
        shard_bytes: int,
        first_document: int = 0,
        max_documents: int = MAX_SHARD_DOCUMENTS,
    ):
        self._directory = directory
        self._tokenizer = tokenizer
        self._shard_bytes = shard_bytes
        self._max_documents = max_documents
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._stored_type = np.dtype(self._dtype).newbyteorder("<")
        self._suffix = payload_suffix(self._dtype)
        self._shards: list[dict[str, Any]] = []
        self._records: list[np.ndarray] = []
        self._payload_crcs: list[int] = []  # of the shard being written
        self._first_document = first_document
        self._num_documents = 0
        self._max_token_id = 0
        self._tar: tarfile.TarFile | None = None
        self._file: io.BufferedWriter | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # after a failure, which is raised already; a finished shard is closed
            self.close()

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return self._num_documents

    def add(self, tokens: Sequence[int], meta: Mapping[str, object]) -> None:
        """Append one document.

        Args:
            tokens: token ids of the whole document, without the end-of-document token.
            meta: where the document comes from; must not depend on the machine or the time.

        Raises:
            InputError: a token id lies outside the tokenizer's vocabulary.
        """
        ids = np.asarray(tokens, np.int64)
        if ids.size:
            smallest, largest = int(ids.min()), int(ids.max())
            if smallest < 0 or largest >= self._tokenizer.vocab_size:
                found = str(smallest if smallest < 0 else largest)
                expected = f"token ids from 0 to {self._tokenizer.vocab_size - 1}"
                raise bad_input(str(meta.get("path", self._num_documents)), "token id", found, expected)
            self._max_token_id = max(self._max_token_id, largest)
        payload = ids.astype(self._stored_type).tobytes()
        tar = self._tar or self._open_shard()
        key = document_key(self._first_document + self._num_documents)
        _add_member(tar, f"{key}.json", json.dumps(meta, sort_keys=True, separators=(",", ":")).encode())
        _add_member(tar, f"{key}.{self._suffix}", payload)
        self._payload_crcs.append(zlib.crc32(payload))
        self._num_documents += 1
        if tar.offset >= self._shard_bytes or len(self._payload_crcs) >= self._max_documents:
            self._close_shard()

    def finish_shards(self) -> WrittenShards:
        """Close the last shard; without any document there is none."""
        self._close_shard()
        index = np.concatenate(self._records) if self._records else np.empty(0, INDEX_DTYPE)
        return WrittenShards(self._shards, index, self._max_token_id)

    def close(self) -> None:
        """Close files that are still open; needed only when the last shard was not finished."""
        tar, file = self._tar, self._file
        self._tar = self._file = None
        try:
            if tar is not None:
                tar.close()
        finally:
            if file is not None:
                file.close()

    def _open_shard(self) -> tarfile.TarFile:
        self._file = (self._directory / shard_name(len(self._shards))).open("wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w|", format=tarfile.USTAR_FORMAT)
        return self._tar

    def _close_shard(self) -> None:
        if self._tar is None or self._file is None:
            return
        path = Path(self._file.name)
        self._tar.close()
        self._file.close()
        self._tar = self._file = None
        itemsize = self._stored_type.itemsize
        records, digest = _index_shard(path, len(self._shards), self._suffix, itemsize, self._payload_crcs)
        self._records.append(records)
        self._shards.append(
            {
                "name": path.name,
                "bytes": path.stat().st_size,
                "sha256": digest,
                "documents": len(records),
                "tokens": int(records["tokens"].sum()),
            }
        )
        self._payload_crcs = []


class DatasetWriter(ShardWriter):
    """Write documents into webdataset shards, then the index and the manifest.

    Args:
        directory: an existing, empty directory.
        tokenizer: made the token ids that will be added; it is copied into the dataset.
        shard_bytes: a shard is closed once it holds at least this many bytes.
        max_documents: a shard is closed once it holds this many documents.
    """

    def __init__(
        self, directory: Path, tokenizer: Tokenizer, shard_bytes: int, max_documents: int = MAX_SHARD_DOCUMENTS
    ):
        super().__init__(directory, tokenizer, shard_bytes, max_documents=max_documents)

    def finish(self) -> Manifest:
        """Close the last shard and write the index, the tokenizer copy and the manifest.

        Raises:
            ValueError: no document was added.
        """
        if not self._num_documents:
            raise ValueError("a dataset needs at least one document")
        shards = self.finish_shards()
        return complete_dataset(self._directory, self._tokenizer, shards.entries, [shards.index], shards.max_token_id)


def complete_dataset(
    directory: Path,
    tokenizer: Tokenizer,
    entries: Sequence[Mapping[str, Any]],
    indexes: Iterable[np.ndarray],
    max_token_id: int,
) -> Manifest:
    """Write the index, the tokenizer copy and the manifest of a directory that holds finished shards.

    Args:
        directory: the dataset.
        tokenizer: made the token ids; it is copied into the dataset.
        entries: `ShardEntry` fields of all shards, in order; at least one.
        indexes: INDEX_DTYPE arrays that together describe all documents, one in memory at a time.
        max_token_id: largest id in the shards.

    Raises:
        InputError: there is no document.
    """
    documents = sum(entry["documents"] for entry in entries)
    if not documents:
        raise bad_input("--input", "documents", "none that this tokenizer can write", "at least one")
    index_path = directory / INDEX_NAME
    write_array(index_path, INDEX_DTYPE, (documents,), indexes)
    copy_tokenizer(tokenizer.files[0].parent, directory / TOKENIZER_DIRECTORY)
    fields = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION if tokenizer.bos_id is None else BOS_FORMAT_VERSION,
        "dtype": token_dtype(tokenizer.vocab_size),
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "tokenizer_sha256": tokenizer.sha256,
        "documents": documents,
        "tokens": sum(entry["tokens"] for entry in entries),
        # The end-of-document token is read back too.
        "max_token_id": max(max_token_id, tokenizer.eos_id),
        "shards": list(entries),
        "index": {"name": INDEX_NAME, "bytes": index_path.stat().st_size, "sha256": file_sha256(index_path)},
    }
    if tokenizer.bos_id is not None:
        fields["bos_id"] = tokenizer.bos_id
    fields["fingerprint"] = fingerprint(fields)
    text = json.dumps(fields, indent=1, sort_keys=True) + "\n"
    (directory / MANIFEST_NAME).write_text(text, encoding="utf-8")
    return Manifest.model_validate_json(text)


def join_units(directory: Path, result: Path, tokenized: Sequence[TokenizedUnit], tokenizer: Tokenizer) -> Manifest:
    """Number the shards of all work units consecutively, and write index and manifest. Can be repeated after a stop.

    Args:
        directory: holds the directories of the work units.
        result: the dataset; made if missing.
        tokenized: of all work units.
        tokenizer: made the token ids.
    """
    result.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    first_shards = []
    for number, unit in enumerate(tokenized):
        first_shards.append(len(entries))
        for shard in unit.shards:
            entry = shard | {"name": shard_name(len(entries))}
            source, target = unit_directory(directory, number) / shard["name"], result / entry["name"]
            if source.exists():  # else moved before a stop
                source.replace(target)
            if target.stat().st_size != entry["bytes"]:
                raise OSError(f"{target}: {target.stat().st_size} bytes, wrote {entry['bytes']}")
            entries.append(entry)
    indexes = (_moved_index(directory, number, first_shard) for number, first_shard in enumerate(first_shards))
    return complete_dataset(result, tokenizer, entries, indexes, max(unit.max_token_id for unit in tokenized))


def _moved_index(directory: Path, number: int, first_shard: int) -> np.ndarray:
    index = load_unit_index(directory, number)
    index["shard"] += first_shard
    return index


def _add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Append a member as webdataset's own writer does, to the byte: importing that one takes seconds, for all of torch.

    The time of its change is 0: a rebuild gives the same bytes.
    """
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), 0o444
    member.uname = member.gname = "bigdata"
    tar.addfile(member, io.BytesIO(content))


def _index_shard(path: Path, shard: int, suffix: str, itemsize: int, payload_crcs: list[int]) -> tuple[np.ndarray, str]:
    """Read a finished shard back, so that the index describes what is on the disk.

    Args:
        path: the shard.
        shard: its position in the manifest.
        suffix: suffix of the token members.
        itemsize: bytes of a stored token.
        payload_crcs: crc32 of each payload as it was handed to the tar writer.

    Returns:
        Records INDEX_DTYPE [documents of the shard], and the shard's sha256.

    Raises:
        OSError: what was read back is not what was written.
    """
    records = []
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            members = [member for member in tar if member.name.endswith("." + suffix)]
        if len(members) != len(payload_crcs):
            raise OSError(f"{path}: wrote {len(payload_crcs)} documents, read back {len(members)}")
        for member, expected in zip(members, payload_crcs, strict=True):
            file.seek(member.offset)
            header, payload = file.read(TAR_BLOCK_BYTES), file.read(member.size)
            if zlib.crc32(payload) != expected:
                raise OSError(f"{path}: offset {member.offset}: what was read back is not what was written")
            crc = zlib.crc32(payload, zlib.crc32(header))
            records.append((shard, crc, member.offset, member.size, member.size // itemsize + 1))
    return np.array(records, INDEX_DTYPE), digest
