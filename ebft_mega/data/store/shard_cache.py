"""A cache of remote shards on the local disk: limited in size, shared by all processes of a node. Imports no torch."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from ebft_mega.data.store.format import ShardEntry
from ebft_mega.errors import DamagedDataError

logger = logging.getLogger(__name__)


class WrongShardError(DamagedDataError):
    """A shard was downloaded completely, and its sha256 is not the manifest's."""


@dataclass(frozen=True)
class ShardCache:
    """Whole shards, stored under their sha256, so that equal file names of different datasets cannot collide.

    A file gets its final name only after its size and sha256 were checked. Each shard is downloaded by one process at
    a time, while others wait for it. The least recently used shards are deleted when room is needed. A shard that a
    process has open stays readable for it after the deletion (POSIX); its disk space is free once it is closed. All
    state is on the disk: processes that use the same directory share the cache.

    Args:
        directory: made when it is needed. Also holds manifest, index and tokenizer of each dataset, in a directory
            named by its fingerprint; these do not count towards the limit.
        limit_bytes: upper limit for all shards together, unfinished downloads included.
    """

    directory: Path
    limit_bytes: int

    def dataset_directory(self, fingerprint: str) -> Path:
        """Where manifest, index and tokenizer of a dataset belong."""
        return self.directory / fingerprint

    def lock(self, name: str) -> FileLock:
        """A lock between all threads and processes that use this cache; gone with the process that holds it."""
        path = self.directory / "locks" / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path)

    def shard_path(self, entry: ShardEntry) -> Path:
        """Where the copy of a shard belongs."""
        return self.directory / "shards" / f"{entry.sha256}.tar"

    def open(
        self, entry: ShardEntry, place: str, download: Callable[[], Iterator[bytes]], wait_seconds: float
    ) -> int | None:
        """Open the copy of a shard, after downloading it where there is none.

        Args:
            entry: the shard.
            place: its URL, for messages.
            download: gives its bytes in order.
            wait_seconds: for a download by another thread or process.

        Returns:
            A descriptor to read from, which the caller closes. None where the cache or the disk has no room for the
            shard, or where another thread or process is still downloading it.

        Raises:
            DamagedDataError: the download failed.
            WrongShardError: the downloaded bytes do not have the manifest's sha256.
        """
        try:
            descriptor = self._open_copy(entry)
            return self._fetch(entry, place, download, wait_seconds) if descriptor is None else descriptor
        except OSError as error:
            logger.warning("%s is read by byte ranges: the cache cannot hold it: %s", place, error)
            return None

    def discard(self, entry: ShardEntry, descriptor: int) -> None:
        """Delete the copy that a descriptor was opened from, unless it has been replaced since."""
        with self.lock(entry.sha256), suppress(FileNotFoundError):
            path = self.shard_path(entry)
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                path.unlink()

    def _open_copy(self, entry: ShardEntry) -> int | None:
        try:
            descriptor = os.open(self.shard_path(entry), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        if os.fstat(descriptor).st_size != entry.bytes:
            os.close(descriptor)
            return None  # truncated: the download replaces it
        with suppress(PermissionError):  # the copy of another user
            os.utime(descriptor)  # used now
        return descriptor

    def _fetch(
        self, entry: ShardEntry, place: str, download: Callable[[], Iterator[bytes]], wait_seconds: float
    ) -> int | None:
        lock = self.lock(entry.sha256)
        try:
            lock.acquire(timeout=wait_seconds)
        except Timeout:
            return None
        try:
            descriptor = self._open_copy(entry)  # another process may have downloaded it meanwhile
            return self._download(entry, place, download) if descriptor is None else descriptor
        finally:
            lock.release()

    def _download(self, entry: ShardEntry, place: str, download: Callable[[], Iterator[bytes]]) -> int | None:
        path = self.shard_path(entry)
        partial = path.with_suffix(".part")
        if not self._reserve(partial, entry.bytes):
            return None
        try:
            digest = hashlib.sha256()
            with partial.open("r+b") as file:
                for chunk in download():
                    digest.update(chunk)
                    file.write(chunk)
            if digest.hexdigest() != entry.sha256:
                raise WrongShardError(place, None, f"sha256 {entry.sha256}", f"sha256 {digest.hexdigest()}")
            # Opened before it gets its final name, under which another process may delete it at any time.
            descriptor = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
            partial.replace(path)
            return descriptor
        finally:
            partial.unlink(missing_ok=True)

    def _reserve(self, partial: Path, num_bytes: int) -> bool:
        """Make room and reserve it with a file of the shard's size; False where the limit does not allow it."""
        partial.parent.mkdir(parents=True, exist_ok=True)
        with self.lock("room"):
            partial.unlink(missing_ok=True)
            copies = []
            free = self.limit_bytes
            for item in os.scandir(partial.parent):
                with suppress(FileNotFoundError):  # replaced or discarded in this moment
                    if item.name.endswith(".part") and self._abandoned(Path(item.path)):
                        os.unlink(item.path)
                        continue
                    status = item.stat()
                    free -= status.st_size
                    if item.name.endswith(".tar"):
                        copies.append((status.st_mtime_ns, status.st_size, item.path))
            if free + sum(size for _, size, _ in copies) < num_bytes:
                return False
            copies.sort(reverse=True)
            while free < num_bytes:
                _, size, oldest = copies.pop()
                with suppress(FileNotFoundError):
                    os.unlink(oldest)
                free += size
            with partial.open("xb") as file:
                file.truncate(num_bytes)
        return True

    def _abandoned(self, partial: Path) -> bool:
        """Whether the process that was downloading this shard has ended."""
        lock = self.lock(partial.stem)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return False
        lock.release()
        return True
