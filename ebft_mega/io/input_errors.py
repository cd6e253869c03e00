"""Errors about the user's input files and options, and reading files with such errors."""

import os
import stat
from pathlib import Path

from ebft_mega.errors import InputError, Problem
from ebft_mega.io.parse_boundary import reading, words_of

NO_FILE = "no such file"
_LFS_POINTER = b"version https://git-lfs"
MAX_JSON_BYTES = 256 * 2**20  # far above any tokenizer's; a larger file is no description of anything
_KINDS = ((stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"))


def bad_input(where: object, key: str, found: object, expected: object) -> InputError:
    """An `InputError` with one problem; see `Problem` for the fields."""
    return InputError([Problem(str(where), key, str(found), str(expected))])


def file_obstacle(path: Path) -> str | None:
    """Why a path cannot be read as a file, in words; None if it can be tried.

    A FIFO or a device is not opened: reading it could wait indefinitely.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return NO_FILE
    except (OSError, ValueError) as error:  # links in a circle, no permission; a name with a zero byte
        return words_of(error)
    if stat.S_ISREG(mode):
        return None
    return next((words for is_kind, words in _KINDS if is_kind(mode)), "a device")


def read_input_bytes(path: Path, description: str, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Read a regular file.

    Args:
        path: the file, or a link to it.
        description: what the file should be, for the message.
        max_bytes: a longer file is refused unread.

    Raises:
        InputError: there is no such file, it is something else, too long, or cannot be read.
    """
    obstacle = file_obstacle(path)
    if obstacle is not None:
        raise bad_input(path, path.name, obstacle, description)
    with reading(path, path.name, description):
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            # Files of /proc have no size, and a file may grow.
            content = file.read(max_bytes + 1) if size <= max_bytes else b""
        if max(size, len(content)) > max_bytes:
            length = f"{size} bytes" if size > max_bytes else f"more than {max_bytes} bytes"
            raise bad_input(path, path.name, length, f"{description}, of at most {max_bytes} bytes")
    if found := lfs_pointer(content):
        raise bad_input(path, path.name, found, description)
    return content


def lfs_pointer(content: bytes) -> str | None:
    """Say so where a file is the few lines that stand for it in a repository with large files; None elsewhere."""
    return "a Git LFS pointer, not the file: git lfs pull" if content.startswith(_LFS_POINTER) else None
