"""Read files that nobody vouches for: nothing is waited for, and no more of a file is in memory than is asked for."""

import os
import stat
from pathlib import Path
from typing import IO, BinaryIO

# A pipe that takes the file's place meanwhile is not waited for, and a terminal does not become this process's own.
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_SKIPPED_BYTES = 1 << 18


class NoRegularFileError(OSError):
    """A pipe, socket or device where a file should be."""


def open_regular(file: Path) -> BinaryIO:
    """Open a regular file, or a link to one, for reading bytes.

    Raises:
        NoRegularFileError: it is something else; it is opened only if it became that a moment ago.
        OSError: it cannot be opened.
    """
    _require_regular(os.stat(file), file)
    descriptor = os.open(file, _FLAGS)
    try:
        _require_regular(os.fstat(descriptor), file)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_at_most(file: Path, max_bytes: int) -> bytes | None:
    """Read a regular file whole; None if it is longer than `max_bytes`, which is found out without reading on.

    Raises:
        NoRegularFileError: see `open_regular`.
        OSError: it cannot be read.
    """
    with open_regular(file) as stream:
        if os.fstat(stream.fileno()).st_size > max_bytes:
            return None
        content = stream.read(max_bytes + 1)  # it may have grown
    return content if len(content) <= max_bytes else None


def read_line(stream: IO[bytes], max_bytes: int) -> tuple[bytes | None, int]:
    """Read a line with its line end; a longer one than `max_bytes` is read to its end in small parts and dropped.

    Returns:
        The line, empty at the end of the file and None where it is too long; and its bytes.
    """
    line = stream.readline(max_bytes + 1)
    if len(line) <= max_bytes:
        return line, len(line)
    size = len(line)
    ended = line.endswith(b"\n")
    del line
    return None, size if ended else size + skip_line(stream, None)


def skip_line(stream: IO[bytes], most: int | None) -> int:
    """Read to the end of a line in small parts, or about as many bytes as `most` says, and return how many it were."""
    size = 0
    while part := stream.readline(_SKIPPED_BYTES):
        size += len(part)
        if part.endswith(b"\n") or (most is not None and size >= most):
            break
    return size


def _require_regular(found: os.stat_result, file: Path) -> None:
    if not stat.S_ISREG(found.st_mode):
        is_folder = stat.S_ISDIR(found.st_mode)
        raise NoRegularFileError(0, "a directory" if is_folder else "a pipe, socket or device", str(file))
