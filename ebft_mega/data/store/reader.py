"""Read byte ranges of shards, local or remote, and check each document that is read."""

import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ebft_mega.data.store.format import TAR_BLOCK_BYTES
from ebft_mega.errors import DamagedDataError


class ShardBytes(Protocol):
    """Access to the shards of one dataset by byte ranges.

    An implementation may be pickled and may be used in a forked process; each process holds its own
    descriptors, connections and threads.
    """

    def read(self, shard: int, offset: int, num_bytes: int) -> bytes:
        """Read a byte range; fewer bytes come back only where the shard ends.

        Args:
            shard: position of the shard in the manifest.
            offset: first byte.
            num_bytes: bytes to read.

        Raises:
            DamagedDataError: the shard cannot be opened or read.
        """
        ...

    def place(self, shard: int) -> str:
        """Path or URL of a shard, for messages."""
        ...

    def expect(self, shards: Sequence[int]) -> None:
        """Announce the shards that will be read next, in this order; returns immediately."""
        ...

    def close(self) -> None:
        """Close descriptors and idle connections and end threads; a later read opens them again."""
        ...


class ShardFiles:
    """Local shard files of one dataset (`ShardBytes`), at most `max_open` of them open at a time.

    Reads carry their offset (`os.pread`), so a forked worker may share a descriptor; the table itself belongs
    to one process and starts empty in a forked or unpickled copy.

    Args:
        paths: the shard files.
        max_open: descriptors to keep open.
    """

    def __init__(self, paths: list[Path], max_open: int = 64):
        self._paths = paths
        self._max_open = max_open
        self._start_empty()

    def _start_empty(self) -> None:
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()
        self._process = os.getpid()

    def read(self, shard: int, offset: int, num_bytes: int) -> bytes:
        """Read a byte range; fewer bytes come back only where the file ends.

        Args:
            shard: position of the shard in the manifest.
            offset: first byte.
            num_bytes: bytes to read.

        Raises:
            DamagedDataError: the file cannot be opened or read.
        """
        if self._process != os.getpid():
            # The parent's lock may be held by one of its threads, and its descriptors are the parent's to
            # close.
            self._start_empty()
        with self._lock:
            try:
                return read_fully(self._descriptor(shard), offset, num_bytes)
            except OSError as error:
                raise DamagedDataError(self.place(shard), offset, f"{num_bytes} bytes", str(error.strerror)) from error

    def place(self, shard: int) -> str:
        """Path of a shard."""
        return str(self._paths[shard])

    def expect(self, shards: Sequence[int]) -> None:
        """Do nothing: a local file is there already."""

    def _descriptor(self, shard: int) -> int:
        if shard not in self._descriptors:
            if len(self._descriptors) >= self._max_open:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[shard] = os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC)
        self._descriptors.move_to_end(shard)
        return self._descriptors[shard]

    def close(self) -> None:
        """Close every descriptor; a later read opens them again."""
        if self._process != os.getpid():
            return
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def __del__(self) -> None:
        # Missing only when the constructor itself failed.
        if hasattr(self, "_process"):
            self.close()

    def __getstate__(self) -> dict[str, object]:
        return {"_paths": self._paths, "_max_open": self._max_open}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._start_empty()


def read_fully(descriptor: int, offset: int, num_bytes: int) -> bytes:
    """Read a byte range of an open file; fewer bytes come back only where the file ends.

    One `pread` returns at most 2 GiB and may return less, so it is repeated.
    """
    parts = [os.pread(descriptor, num_bytes, offset)]
    done = len(parts[0])
    while done < num_bytes and parts[-1]:
        parts.append(os.pread(descriptor, num_bytes - done, offset + done))
        done += len(parts[-1])
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_member(files: ShardBytes, shard: int, offset: int, payload_bytes: int, crc32: int, document: int) -> bytes:
    """Read a document's tar header and payload and check them against the index.

    Args:
        files: the dataset's shards.
        shard, offset, payload_bytes, crc32: of the document's `INDEX_DTYPE` record.
        document: number of the document, for messages.

    Returns:
        The header and behind it the payload, `TAR_BLOCK_BYTES + payload_bytes` bytes: a document may be large,
        so the payload is not copied out of what was read.

    Raises:
        DamagedDataError: the file is shorter than the index says or the checksum differs; names shard,
            offset, expected and found.
    """
    expected_bytes = TAR_BLOCK_BYTES + payload_bytes
    data = files.read(shard, offset, expected_bytes)
    if len(data) != expected_bytes:
        expected, found = f"{expected_bytes} bytes", f"{len(data)} bytes"
        raise DamagedDataError(files.place(shard), offset, expected, found, document)
    found_crc32 = zlib.crc32(data)
    if found_crc32 != crc32:
        expected, found = f"crc32 {crc32:08x}", f"crc32 {found_crc32:08x}"
        raise DamagedDataError(files.place(shard), offset, expected, found, document)
    return data
