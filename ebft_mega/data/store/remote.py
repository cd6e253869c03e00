"""Read the shards of a dataset on a server, cached whole or by byte ranges. Imports no torch."""

import logging
import os
import threading
import zlib
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from ebft_mega.data.store.format import (
    INDEX_NAME,
    TAR_BLOCK_BYTES,
    WINDOW_DOCUMENTS,
    Manifest,
)
from ebft_mega.data.store.index_file import load_index
from ebft_mega.data.store.reader import read_fully
from ebft_mega.data.store.shard_cache import ShardCache, WrongShardError
from ebft_mega.errors import DamagedDataError
from ebft_mega.extension.store import StoreClient

logger = logging.getLogger(__name__)

# How long to wait for a shard that another thread or process is downloading; after that, its documents are read by
# byte ranges. While a server hangs, the processes of a node try the download in turn: waiting for all of them would
# exceed the run's own time limit for a step.
_WAIT_SECONDS = 60.0

OnError = Literal["raise", "skip"]


def whole_shard_bytes(manifest: Manifest) -> int:
    """Smallest cache with which shards are downloaded whole; with a smaller one documents are read by byte ranges.

    Documents are read in random order within a window of shards, and a row may reach into the next window. A cache
    that does not hold two windows would delete shards that are needed again soon after.

    Args:
        manifest: of the dataset.

    Returns:
        Bytes that hold any two windows, or the whole dataset where that is less.
    """
    # Without its last shard, a window has fewer than WINDOW_DOCUMENTS documents. The shards with the longest documents
    # give an upper bound of their bytes.
    shards = sorted(manifest.shards, key=lambda shard: shard.bytes / shard.documents, reverse=True)
    window_bytes = documents = 0
    for shard in shards:
        if documents >= WINDOW_DOCUMENTS:
            break
        window_bytes += shard.bytes
        documents += shard.documents
    window_bytes += max(shard.bytes for shard in shards)
    return min(2 * window_bytes, sum(shard.bytes for shard in shards))


class RemoteShards:
    """The shards of a dataset on a server (`ShardBytes`).

    Where the cache is large enough (`whole_shard_bytes`), a shard is downloaded whole when it is first read, and
    one background thread downloads announced shards in advance (`expect`). Otherwise, and where the cache has no room
    for a shard or another process takes long to download it, every read is a range request.

    A downloaded shard with a wrong sha256 makes every read from it an error. With `on_error` "skip" it is logged
    instead, and its documents are read by range requests: only those with a wrong checksum are errors.

    A wrong checksum of a document in a cached copy is not an error at first: the copy is deleted and the shard
    downloaded again, once per process.

    Args:
        address: of the dataset directory.
        manifest: of the dataset.
        directory: local directory with its index.
        cache: of this node.
        client: to read with.
        on_error: what a downloaded shard with a wrong sha256 leads to, see above.
        max_open: descriptors to keep open.
    """

    def __init__(
        self,
        address: str,
        manifest: Manifest,
        directory: Path,
        cache: ShardCache,
        client: StoreClient,
        on_error: OnError = "raise",
        max_open: int = 64,
    ):
        self._downloads = _Downloads(address, manifest, cache, client)
        self._directory = directory
        self._first_documents = [0, *accumulate(shard.documents for shard in manifest.shards)]
        self._on_error = on_error
        self._max_open = max_open
        self._whole = cache.bytes_for_shards() >= whole_shard_bytes(manifest)
        # A process that unpickles this object depends on the one that sent it.
        self._hold: BinaryIO | None = cache.hold(manifest.fingerprint)
        self._start_empty()

    def _start_empty(self) -> None:
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self._wrong: dict[int, WrongShardError] = {}
        self._renewed: set[int] = set()
        self._index: np.ndarray | None = None
        self._ahead: _DownloadsAhead | None = None
        self._lock = threading.Lock()
        self._process = os.getpid()

    def read(self, shard: int, offset: int, num_bytes: int) -> bytes:
        """Read a byte range; see `ShardBytes.read`.

        Raises:
            DamagedDataError: the server does not give these bytes.
            WrongShardError: it gives another shard.
        """
        entry = self._downloads.manifest.shards[shard]
        stop = min(offset + num_bytes, entry.bytes)
        if offset >= stop:
            return b""
        if self._process != os.getpid():
            self._start_empty()  # the parent's lock may be held; descriptors and thread are the parent's
        with self._lock:
            while (descriptor := self._descriptor(shard, offset)) is not None:
                data = read_fully(descriptor, offset, stop - offset)
                if shard in self._renewed or (len(data) == stop - offset and self._as_indexed(shard, offset, data)):
                    return data
                logger.warning("%s: the cached copy is damaged and is downloaded again", self.place(shard))
                self._renewed.add(shard)
                self._downloads.cache.discard(entry, descriptor)
                os.close(self._descriptors.pop(shard))
        return b"".join(self._downloads.client.chunks(self.place(shard), offset, stop, entry.bytes))

    def place(self, shard: int) -> str:
        """URL of a shard."""
        return self._downloads.url(shard)

    def expect(self, shards: Sequence[int]) -> None:
        """Queue these shards, in this order, for the background thread that downloads them."""
        if not self._whole:
            return
        if self._process != os.getpid():
            self._start_empty()
        with self._lock:
            if self._ahead is None:
                self._ahead = _DownloadsAhead(self._downloads)
            self._ahead.add(shards)

    def close(self) -> None:
        """Close descriptors and idle connections and end the background thread; a later read opens them again."""
        if self._process != os.getpid():
            return
        with self._lock:
            if self._ahead is not None:
                self._ahead.close()
                self._ahead = None
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])
            self._downloads.client.close()

    def __del__(self) -> None:
        # Missing only when the constructor itself failed.
        if hasattr(self, "_process"):
            self.close()
            if self._hold is not None:
                self._hold.close()

    def __getstate__(self) -> dict[str, object]:
        names = ("_downloads", "_directory", "_first_documents", "_on_error", "_max_open", "_whole")
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._hold = None
        self._start_empty()

    def _descriptor(self, shard: int, offset: int) -> int | None:
        """Open the cached copy of a shard; None where a range request is to be made. The offset is for messages."""
        if not self._whole:
            return None
        if shard not in self._descriptors and shard not in self._wrong:
            self._open(shard)
        if shard in self._wrong and self._on_error == "raise":
            wrong = self._wrong[shard]
            raise WrongShardError(wrong.shard, offset, wrong.expected, wrong.found)
        if shard not in self._descriptors:
            return None
        self._descriptors.move_to_end(shard)
        return self._descriptors[shard]

    def _open(self, shard: int) -> None:
        # Copies that were deleted to make room give their disk space back only when they are closed.
        for other in [other for other, opened in self._descriptors.items() if not os.fstat(opened).st_nlink]:
            os.close(self._descriptors.pop(other))
        try:
            descriptor = self._downloads.open(shard, _WAIT_SECONDS)
        except WrongShardError as wrong:
            logger.warning("%s", wrong)
            self._wrong[shard] = wrong
            return
        if descriptor is not None:
            if len(self._descriptors) >= self._max_open:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[shard] = descriptor

    def _as_indexed(self, shard: int, offset: int, data: bytes) -> bool:
        """False where what was read is a document of the index and its checksum is wrong."""
        manifest = self._downloads.manifest
        if self._index is None:
            # Opened here, not taken from the dataset: pickling this object would copy the whole array.
            self._index = np.asarray(load_index(self._directory / INDEX_NAME))
        offsets = self._index["offset"]
        first = self._first_documents[shard]
        documents = range(first, first + manifest.shards[shard].documents)
        position = bisect_left(documents, offset, key=offsets.__getitem__)
        if position == len(documents):
            return True
        record = self._index[documents[position]]
        if int(record["offset"]) != offset or TAR_BLOCK_BYTES + int(record["payload_bytes"]) != len(data):
            return True
        return zlib.crc32(data) == int(record["crc32"])


class _ClosedError(Exception):
    """The dataset was closed while the background thread was downloading."""


@dataclass(frozen=True)
class _Downloads:
    """Downloads of one dataset's shards into the cache."""

    address: str
    manifest: Manifest
    cache: ShardCache
    client: StoreClient

    def url(self, shard: int) -> str:
        return f"{self.address}/{self.manifest.shards[shard].name}"

    def open(self, shard: int, wait_seconds: float, is_wanted: Callable[[], bool] = lambda: True) -> int | None:
        entry, url = self.manifest.shards[shard], self.url(shard)

        def download() -> Iterator[bytes]:
            for chunk in self.client.chunks(url, 0, entry.bytes, entry.bytes):
                if not is_wanted():
                    raise _ClosedError
                yield chunk

        return self.cache.open(entry, url, download, wait_seconds)


class _DownloadsAhead:
    """A daemon thread that downloads shards in advance; the interpreter does not wait for it at exit."""

    def __init__(self, downloads: _Downloads):
        self._downloads = downloads
        self._closed = False
        self.expected: deque[int] = deque()  # the first one is being downloaded
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._work, name="shards-ahead", daemon=True)
        self.thread.start()

    def add(self, shards: Sequence[int]) -> None:
        with self.changed:
            for shard in shards:
                if shard not in self.expected:
                    self.expected.append(shard)
            self.changed.notify_all()

    def close(self) -> None:
        with self.changed:
            self._closed = True
            self.changed.notify_all()

    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.expected or self._closed)
                if self._closed:
                    return
                shard = self.expected[0]
            # A shard that another process is downloading is skipped. An error here occurs again, and is reported, when
            # the shard is read.
            with suppress(DamagedDataError, OSError, _ClosedError):
                descriptor = self._downloads.open(shard, wait_seconds=0, is_wanted=lambda: not self._closed)
                if descriptor is not None:
                    os.close(descriptor)
            with self.changed:
                self.expected.popleft()
                self.changed.notify_all()
