"""A cache of remote datasets on the local disk: limited in size, shared by processes of a node. Imports no torch."""

import fcntl
import hashlib
import logging
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from ebft_mega.data.store.cache_folder import new_file, open_copy, opened_folder, plain_files, remove
from ebft_mega.data.store.format import MANIFEST_NAME, ShardEntry
from ebft_mega.errors import DamagedDataError

logger = logging.getLogger(__name__)

# Manifest, index and tokenizer are always stored, so they may take this much of a smaller limit, too.
DESCRIPTION_BYTES = 100_000_000
# A description that no process holds is not deleted until then: one may be about to hold it.
_UNUSED_SECONDS = 3600.0
_COPY = re.compile(r"([0-9a-f]{64})\.(tar|part)")
_DESCRIPTION = re.compile(r"([0-9a-f]{64})(\.incoming)?")


class WrongShardError(DamagedDataError):
    """A shard was downloaded completely, and its sha256 is not the manifest's."""


@dataclass(frozen=True)
class ShardCache:
    """Whole shards, stored under their sha256, so that equal file names of different datasets cannot collide.

    A file gets its final name only after its size and sha256 were checked. Each shard is downloaded by one process at
    a time, while others wait for it. The least recently used shards are deleted when room is needed. A shard that a
    process has open stays readable for it after the deletion (POSIX); its disk space is free once it is closed. All
    state is on the disk: processes that use the same directory share the cache. Links in it are never followed.

    Args:
        directory: made when it is needed. Also holds the description (manifest, index and tokenizer) of each dataset,
            in a directory named by its fingerprint.
        limit_bytes: upper limit for everything together, unfinished downloads included; descriptions may take
            `DESCRIPTION_BYTES` even where it is smaller.
    """

    directory: Path
    limit_bytes: int

    def dataset_directory(self, fingerprint: str) -> Path:
        """Where manifest, index and tokenizer of a dataset belong."""
        return self.directory / fingerprint

    def lock(self, name: str) -> FileLock:
        """A lock between all threads and processes that use this cache; gone with the process that holds it."""
        path = self.directory / "locks" / f"{name}.lock"
        with opened_folder(path.parent):
            return FileLock(path)

    def shard_path(self, entry: ShardEntry) -> Path:
        """Where the copy of a shard belongs."""
        return self.directory / "shards" / f"{entry.sha256}.tar"

    def bytes_for_shards(self) -> int:
        """How much of the limit the descriptions leave to shards."""
        return max(0, self.limit_bytes - sum(self._descriptions().values()))

    def make_room_for_description(self, fingerprint: str, num_bytes: int) -> int:
        """Delete shards, and descriptions that nobody uses, until a dataset's description has room; and leftovers.

        Args:
            fingerprint: of the dataset, whose lock the caller holds.
            num_bytes: least size of its description.

        Returns:
            Bytes that it may have at most; fewer than `num_bytes` where the limit does not allow it.
        """
        limit = max(self.limit_bytes, DESCRIPTION_BYTES)
        with self.lock("room"):
            self._remove_leftovers(fingerprint)
            descriptions = self._descriptions()
            descriptions.pop(fingerprint, None)
            for other in sorted(descriptions, key=self._last_use):
                if limit - sum(descriptions.values()) >= num_bytes:
                    break
                if self._remove_unused(other):
                    del descriptions[other]
            room = limit - sum(descriptions.values())
            if room >= num_bytes:
                self._make_room(room - num_bytes)
            return room

    def hold(self, fingerprint: str) -> BinaryIO:
        """Keep a dataset's description from being deleted.

        Returns:
            A file; closing it in this process and in all forked ones ends that.
        """
        path = self.dataset_directory(fingerprint)
        held = _open_manifest(path)
        with suppress(OSError):  # a file system without such locks: there it is not deleted either
            fcntl.flock(held, fcntl.LOCK_SH)
        with suppress(OSError):  # made by another user, or read-only
            os.utime(path, follow_symlinks=False)  # used now
        return held

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
        name = self.shard_path(entry).name
        with self.lock(entry.sha256), self._shards() as folder, suppress(FileNotFoundError):
            if os.path.samestat(os.stat(name, dir_fd=folder, follow_symlinks=False), os.fstat(descriptor)):
                os.unlink(name, dir_fd=folder)

    def _shards(self) -> AbstractContextManager[int]:
        return opened_folder(self.directory / "shards")

    def _open_copy(self, entry: ShardEntry) -> int | None:
        path = self.shard_path(entry)
        if not path.parent.exists():
            return None
        with self._shards() as folder:
            descriptor = open_copy(folder, path.name, entry.bytes)
        if descriptor is not None:
            with suppress(OSError):  # the copy of another user, or a file system that is read-only
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
        name, partial = f"{entry.sha256}.tar", f"{entry.sha256}.part"
        with self._shards() as folder:
            descriptor = self._reserve(folder, partial, entry.bytes)
            if descriptor is None:
                return None
            is_whole = False
            try:
                digest = hashlib.sha256()
                with os.fdopen(descriptor, "wb", closefd=False) as file:
                    for chunk in download():
                        digest.update(chunk)
                        file.write(chunk)
                if digest.hexdigest() != entry.sha256:
                    raise WrongShardError(place, None, f"sha256 {entry.sha256}", f"sha256 {digest.hexdigest()}")
                os.replace(partial, name, src_dir_fd=folder, dst_dir_fd=folder)
                is_whole = True
                return descriptor
            finally:
                if not is_whole:
                    os.close(descriptor)
                    with suppress(FileNotFoundError):
                        os.unlink(partial, dir_fd=folder)

    def _reserve(self, folder: int, partial: str, num_bytes: int) -> int | None:
        """Make room and reserve it with a file of the shard's size; None where the limit does not allow it.

        Raises:
            OSError: also where the shard's final name is a folder's.
        """
        with suppress(FileNotFoundError):
            name = partial.replace(".part", ".tar")
            if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                os.rmdir(name, dir_fd=folder)
        with self.lock("room"):
            with suppress(FileNotFoundError):
                os.unlink(partial, dir_fd=folder)
            if not self._make_room(self.bytes_for_shards() - num_bytes):
                return None
            return new_file(folder, partial, num_bytes)

    def _make_room(self, limit_bytes: int) -> bool:
        """Delete the least recently used shards until the others fit; False, and nothing, where that is not enough."""
        if not (self.directory / "shards").exists():
            return limit_bytes >= 0
        with self._shards() as folder:
            copies, used = [], 0
            for item in os.scandir(folder):
                with suppress(FileNotFoundError):  # replaced or discarded in this moment
                    match = _COPY.fullmatch(item.name)
                    if match and match[2] == "part" and self._is_abandoned(match[1]):
                        os.unlink(item.name, dir_fd=folder)
                        continue
                    status = item.stat(follow_symlinks=False)
                    used += status.st_size
                    if match and match[2] == "tar" and not stat.S_ISDIR(status.st_mode):
                        copies.append((status.st_mtime_ns, status.st_size, item.name))
            if used - sum(size for _, size, _ in copies) > limit_bytes:
                return False
            copies.sort(reverse=True)
            while used > limit_bytes:
                _, size, oldest = copies.pop()
                with suppress(FileNotFoundError):
                    os.unlink(oldest, dir_fd=folder)
                used -= size
        return True

    def _is_abandoned(self, name: str) -> bool:
        """Whether the process that was downloading this shard, or copying this description, has ended."""
        lock = self.lock(name)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return False
        lock.release()
        return True

    def _remove_leftovers(self, fingerprint: str) -> None:
        """Delete what killed processes have left of descriptions, and of this one whose lock is held."""
        for item in os.scandir(self.directory):
            match = _DESCRIPTION.fullmatch(item.name)
            if match and match[2] and (match[1] == fingerprint or self._is_abandoned(match[1])):
                remove(self.directory / item.name)

    def _descriptions(self) -> dict[str, int]:
        """Bytes of each description, finished or not, by the name of its directory."""
        found = {}
        if self.directory.exists():
            for item in os.scandir(self.directory):
                if _DESCRIPTION.fullmatch(item.name):
                    found[item.name] = sum(status.st_size for status in plain_files(Path(item.path)) or ())
        return found

    def _last_use(self, name: str) -> float:
        try:
            return (self.directory / name).lstat().st_mtime
        except FileNotFoundError:
            return 0.0

    def _remove_unused(self, name: str) -> bool:
        """Delete a description unless a process holds or copies it, or may be about to hold it."""
        path = self.directory / name
        if time.time() - self._last_use(name) < _UNUSED_SECONDS or not self._is_abandoned(name.partition(".")[0]):
            return False
        try:
            with _open_manifest(path) as manifest:
                fcntl.flock(manifest, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(path)
        except FileNotFoundError:  # no whole description
            remove(path)
        except OSError:  # held, or a file system without such locks
            return False
        return not path.exists()


def _open_manifest(directory: Path) -> BinaryIO:
    return os.fdopen(os.open(directory / MANIFEST_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")
