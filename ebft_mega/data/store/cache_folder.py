"""Files of a cache that other users may write to: nothing of theirs is written through, waited for or deleted for it.

Names are looked up in a folder that is held open, without following a link as its last part; a new file is one that
was not there. Imports no torch.
"""

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# What `open` says of a link, a socket and a missing file: in all three cases there is no copy.
_NO_COPY = (errno.ENOENT, errno.ELOOP, errno.ENXIO)


@contextmanager
def opened_folder(path: Path) -> Iterator[int]:
    """Hold a folder open, made with those above it where it is missing.

    Yields:
        A descriptor, for the `dir_fd` of other calls.

    Raises:
        OSError: a file or a link is in its place, or it cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        path.mkdir()
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise OSError(errno.ENOTDIR, "a link or a file in place of a folder of the cache", str(path)) from error
        raise
    try:
        yield folder
    finally:
        os.close(folder)


def open_copy(folder: int, name: str, num_bytes: int) -> int | None:
    """Open a file of the expected size for reading; None where there is none, or something else.

    The caller closes the descriptor.
    """
    try:
        # A FIFO is not waited for.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        descriptor = os.open(name, flags, dir_fd=folder)
    except OSError as error:
        if error.errno in _NO_COPY:
            return None
        raise
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size == num_bytes:
        return descriptor
    os.close(descriptor)
    return None


def new_file(folder: int, name: str, num_bytes: int) -> int:
    """Make a file of this size that is open for reading and writing; the caller closes it.

    Raises:
        OSError: the name is taken, or the disk is full.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(name, flags, 0o666, dir_fd=folder)
    try:
        os.ftruncate(descriptor, num_bytes)
    except OSError:
        os.close(descriptor)
        os.unlink(name, dir_fd=folder)
        raise
    return descriptor


def remove(path: Path) -> None:
    """Delete a file, a link (not what it leads to) or a folder with its contents, as far as that is possible."""
    with suppress(FileNotFoundError):
        if stat.S_ISDIR(path.lstat().st_mode):
            shutil.rmtree(path, ignore_errors=True)  # follows no link
        else:
            path.unlink()


def plain_files(directory: Path, depth: int = 2) -> list[os.stat_result] | None:
    """What `stat` says of all files of a small tree; None where it holds anything else, such as a link, or is none.

    Args:
        directory: its root.
        depth: levels of folders, the root included.
    """
    try:
        if depth < 1 or not stat.S_ISDIR(directory.lstat().st_mode):
            return None
        files: list[os.stat_result] = []
        for entry in directory.iterdir():
            status = entry.lstat()
            if stat.S_ISREG(status.st_mode):
                files.append(status)
                continue
            below = plain_files(entry, depth - 1)
            if below is None:
                return None
            files += below
        return files
    except OSError:  # changed or deleted in this moment
        return None
