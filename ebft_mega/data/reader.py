"""Reading byte ranges of local shards, and checking each document as it is read."""

import os
import threading
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np

from ebft_mega.data.format import TAR_BLOCK_BYTES
from ebft_mega.errors import DamagedDataError


class ShardFiles:
    """Open shard files of one dataset, at most `max_open` of them.

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
        """Reads a byte range; fewer bytes come back only where the file ends.

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
                return _read_fully(self._descriptor(shard), offset, num_bytes)
            except OSError as error:
                path = str(self._paths[shard])
                raise DamagedDataError(path, offset, f"{num_bytes} bytes", str(error.strerror)) from error

    def _descriptor(self, shard: int) -> int:
        if shard not in self._descriptors:
            if len(self._descriptors) >= self._max_open:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[shard] = os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC)
        self._descriptors.move_to_end(shard)
        return self._descriptors[shard]

    def close(self) -> None:
        """Closes every descriptor; a later read opens them again."""
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


def _read_fully(descriptor: int, offset: int, num_bytes: int) -> bytes:
    """One `pread` returns at most 2 GiB and may return less: repeat until done or at the end of the file."""
    parts = [os.pread(descriptor, num_bytes, offset)]
    done = len(parts[0])
    while done < num_bytes and parts[-1]:
        parts.append(os.pread(descriptor, num_bytes - done, offset + done))
        done += len(parts[-1])
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_member(files: ShardFiles, shard_path: Path, record: np.void, document: int) -> bytes:
    """Reads a document's payload and checks it, with its tar header, against the index.

    Args:
        files: the dataset's shard files.
        shard_path: the file that `record` points into, for messages.
        record: the document's `INDEX_DTYPE` record.
        document: number of the document, for messages.

    Returns:
        The payload, `record["payload_bytes"]` bytes.

    Raises:
        DamagedDataError: the file is shorter than the index says or the checksum differs; names shard,
            offset, expected and found.
    """
    offset, payload_bytes = int(record["offset"]), int(record["payload_bytes"])
    expected_bytes = TAR_BLOCK_BYTES + payload_bytes
    data = files.read(int(record["shard"]), offset, expected_bytes)
    if len(data) != expected_bytes:
        raise DamagedDataError(str(shard_path), offset, f"{expected_bytes} bytes", f"{len(data)} bytes", document)
    expected, found = int(record["crc32"]), zlib.crc32(data)
    if found != expected:
        raise DamagedDataError(str(shard_path), offset, f"crc32 {expected:08x}", f"crc32 {found:08x}", document)
    return data[TAR_BLOCK_BYTES:]
