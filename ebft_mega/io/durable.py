"""Durable file writes: temporary file, fsync, rename, fsync of the directory. What is done outlives a loss of power."""

import errno
import json
import os
from pathlib import Path
from typing import Any


def write_bytes(path: Path, content: bytes, shared: bool = False) -> None:
    """Replace a file: a reader sees the old contents, if there were any, or the new ones, and nothing in between.

    What lies there under the file's name or the temporary one's is replaced itself: no link is written through, and no
    pipe is waited for.

    Args:
        path: the file; its directory must exist.
        content: all of it.
        shared: several processes may write this file at the same time. Each then has a temporary file of its own; else
            the next writer overwrites what a killed one has left.
    Raises:
        OSError: the directory is missing or the disk is full; an old file is then untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp" if shared else f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "wb", opener=_not_through_links) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def _not_through_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write_json(path: Path, content: Any, shared: bool = False) -> None:
    """Replace a JSON file, indented for people; see `write_bytes`.

    Raises:
        OSError: as for `write_bytes`.
        TypeError, ValueError: `content` has no JSON form; nothing is written then.
    """
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode(), shared)


def flush_to_disk(path: Path) -> None:
    """Return when the contents of a file that somebody else has written would outlive a loss of power.

    Raises:
        OSError: the disk is full, for example.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Return when the names in a directory would outlive a loss of power.

    Raises:
        OSError: it failed. A file system that cannot do this for directories at all is no failure.
    """
    try:
        flush_to_disk(path)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
