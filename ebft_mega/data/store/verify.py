"""Read whole shards sequentially and check every byte against all checksums. Imports neither torch nor webdataset."""

import hashlib
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ebft_mega.data.store.dataset import Dataset
from ebft_mega.data.store.format import TAR_BLOCK_BYTES, document_key, payload_suffix
from ebft_mega.errors import DamagedDataError

_READ_BYTES = 1 << 22
_TAR_NAME_BYTES = 100
_OCTAL = re.compile(rb"[0-7]+")


@dataclass(frozen=True)
class ShardReport:
    """What one pass over a shard found."""

    shard: str  # path or URL
    documents: int  # undamaged ones
    tokens: int  # of these, end-of-document tokens included
    bytes: int  # that could be read
    problems: tuple[DamagedDataError, ...]  # () for an undamaged shard


def shard_documents(dataset: Dataset, shard: int) -> Iterator[np.ndarray]:
    """Read the documents of a shard in one sequential pass and check all of the shard.

    Reads a few MiB at a time; memory holds these and one document.

    Args:
        dataset: an opened dataset.
        shard: position of the shard in the manifest.

    Yields:
        uint16 or uint32 [tokens of the document - 1], read-only: each document's tokens without the
        end-of-document token, after its header, name, checksum and token ids were checked.

    Raises:
        DamagedDataError: at the first damaged document; after the last one, if the size or sha256 of the whole
            shard is wrong, which covers the bytes that belong to no document's tokens.
    """
    for finding in _findings(dataset, shard, _ShardReader(dataset, shard)):
        if isinstance(finding, DamagedDataError):
            raise finding
        yield finding


def verify_dataset(dataset: Dataset) -> Iterator[ShardReport]:
    """Read every shard of a dataset as `shard_documents` does, and continue after damage.

    A remote dataset that was opened with a cache of 0 bytes is read from the server itself, not from local copies.

    Yields:
        One report per shard, in order. A bit that changed anywhere in a shard is at least one problem.
    """
    for shard in range(len(dataset.manifest.shards)):
        reader = _ShardReader(dataset, shard)
        documents = tokens = 0
        problems = []
        for finding in _findings(dataset, shard, reader):
            if isinstance(finding, DamagedDataError):
                problems.append(finding)
            else:
                documents += 1
                tokens += finding.size + 1
        yield ShardReport(dataset.files.place(shard), documents, tokens, reader.position, tuple(problems))


class _ShardReader:
    """Sequential reads of one shard, and the sha256 of what was read."""

    def __init__(self, dataset: Dataset, shard: int):
        self._files, self._shard = dataset.files, shard
        self._expected_bytes = dataset.manifest.shards[shard].bytes
        self._digest = hashlib.sha256()
        self._buffer = b""  # the last bytes that were read
        self.position = 0  # of the first byte after the buffer

    def take(self, offset: int, num_bytes: int) -> memoryview:
        """Read bytes from `offset` on, fewer where the shard ends; ranges are taken in order and never twice."""
        missing = offset + num_bytes - self.position
        if missing > 0:
            kept = self._buffer[offset - self._start :]
            self._buffer = kept + self._read(max(missing, _READ_BYTES))
        begin = offset - self._start
        return memoryview(self._buffer)[begin : begin + num_bytes]

    def finish(self) -> str:
        """Read the rest of the shard, and one byte more to notice a file that is too long.

        Returns:
            The sha256 of what was read, hexadecimal.
        """
        while self.position < self._expected_bytes and self._read(_READ_BYTES):
            pass
        self.position += len(self._files.read(self._shard, self.position, 1))
        return self._digest.hexdigest()

    @property
    def _start(self) -> int:
        return self.position - len(self._buffer)

    def _read(self, num_bytes: int) -> bytes:
        data = self._files.read(self._shard, self.position, min(num_bytes, self._expected_bytes - self.position))
        self._digest.update(data)
        self.position += len(data)
        return data


def _findings(dataset: Dataset, shard: int, reader: _ShardReader) -> Iterator[np.ndarray | DamagedDataError]:
    """Yield the tokens of each undamaged document and an error for each damage, in the order of the shard."""
    manifest, place = dataset.manifest, dataset.files.place(shard)
    entry = manifest.shards[shard]
    first = sum(other.documents for other in manifest.shards[:shard])
    suffix, dtype = payload_suffix(manifest.dtype), np.dtype(manifest.dtype).newbyteorder("<")
    behind = 0  # first byte after the previous member
    try:
        records = dataset.index[first : first + entry.documents].tolist()
        for number, (_, crc32, offset, payload_bytes, _) in enumerate(records, first):
            yield from _unlisted_documents(reader.take(behind, offset - behind), behind, suffix, place)
            num_bytes = TAR_BLOCK_BYTES + payload_bytes
            behind = offset + _padded(num_bytes)
            member = reader.take(offset, num_bytes)
            if len(member) != num_bytes:
                yield DamagedDataError(place, offset, f"{num_bytes} bytes", f"{len(member)} bytes", number)
                break
            tokens = np.frombuffer(member, dtype, offset=TAR_BLOCK_BYTES)
            name, expected_name = _member_name(member), f"{document_key(number)}.{suffix}"
            largest = int(tokens.max()) if tokens.size else 0
            if (found_crc32 := zlib.crc32(member)) != crc32:
                yield DamagedDataError(place, offset, f"crc32 {crc32:08x}", f"crc32 {found_crc32:08x}", number)
            elif name != expected_name:
                yield DamagedDataError(place, offset, f"member {expected_name}", f"member {name}", number)
            elif largest >= manifest.vocab_size:
                yield DamagedDataError(place, offset, f"token ids below {manifest.vocab_size}", str(largest), number)
            else:
                yield tokens
        else:
            yield from _unlisted_documents(reader.take(behind, entry.bytes - behind), behind, suffix, place)
        sha256 = reader.finish()
    except DamagedDataError as error:
        yield error
        return
    if reader.position != entry.bytes:
        found = f"{reader.position} bytes" if reader.position < entry.bytes else "a longer file"
        yield DamagedDataError(place, None, f"{entry.bytes} bytes", found)
    elif sha256 != entry.sha256:
        yield DamagedDataError(place, None, f"sha256 {entry.sha256}", f"sha256 {sha256}")


def _unlisted_documents(gap: memoryview, offset: int, suffix: str, place: str) -> Iterator[DamagedDataError]:
    """Report token members that the index does not list: their documents would never be read.

    Args:
        gap: the bytes between two documents of the index, from one tar header to another.
        offset: of its first byte in the shard.
        suffix: of token members.
        place: path or URL of the shard.
    """
    position = 0
    while position + TAR_BLOCK_BYTES <= len(gap):
        name = _member_name(gap[position:])
        if name.endswith(f".{suffix}"):
            yield DamagedDataError(place, offset + position, "a member that is in the index", f"member {name}")
        size = bytes(gap[position + 124 : position + 136]).rstrip(b" \0")
        if not _OCTAL.fullmatch(size):  # the end of the archive, or damage, which the shard's sha256 shows
            return
        position += _padded(TAR_BLOCK_BYTES + int(size, 8))


def _member_name(member: memoryview) -> str:
    return bytes(member[:_TAR_NAME_BYTES]).partition(b"\0")[0].decode("ascii", "replace")


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES
