"""Read files of a directory that nobody vouches for: no link leads out of it, nothing is waited for, sizes are bounded.

The directory itself may be reached through links, as the user named it. Below it, a link may lead to any file of the
directory, and in Hugging Face's cache to a blob of the same repository. Hard links and mounts look like plain files
and cannot be told from them.
"""

import codecs
import errno
import os
import re
import stat
from pathlib import Path
from typing import Any

from ebft_mega.io.input_errors import MAX_JSON_BYTES, bad_input, lfs_pointer
from ebft_mega.io.json_text import parse_json
from ebft_mega.io.parse_boundary import reading, words_of

# The cache of huggingface_hub: models--org--name/snapshots/<commit>/file -> ../../blobs/<hash>
_HUB_REPOSITORY = re.compile(r"(models|datasets|spaces)--.+")
_HUB_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_FOLDER_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
# A FIFO that takes the file's place meanwhile is not waited for, and a terminal does not become this process's own.
_FILE_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_KINDS = (
    *((stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket")),
    (stat.S_ISLNK, "links in a circle"),  # all others were followed
)


class LeavesDirectoryError(OSError):
    """A name or a link that leads out of its directory, which `strerror` says."""


def leaves(directory: Path, path: Path) -> Path | None:
    """Where a path below a directory leads if it leads out of it; None if it stays inside, or in the hub's blobs.

    Args:
        directory: may itself be reached through links.
        path: below it, absolute or relative to the working directory as `directory` is; it need not exist.
    Raises:
        OSError: no file can have that name.
    """
    target = _resolved(path)
    return None if _base_of(_resolved(directory), target) is not None else target


def read_contained_bytes(directory: Path, name: str, max_bytes: int) -> bytes:
    """Read a regular file of a directory whole, wherever the links of its name lead within the directory.

    Nothing can change between the check and the reading: the way that was checked is gone part by part, and no link is
    followed on it any more.

    Args:
        directory: may itself be reached through links.
        name: relative to it, without `..`.
        max_bytes: a longer file is refused.
    Raises:
        LeavesDirectoryError: the name, or a link on its way, leads out of the directory.
        OSError: there is no such file, it is something else, too long, or cannot be read.
    """
    if not Path(name).parts or os.path.isabs(name) or ".." in Path(name).parts:
        raise LeavesDirectoryError(errno.EINVAL, "no name of a file below its directory", name)
    path = directory / name
    target = _resolved(path)
    base = _base_of(_resolved(directory), target)
    if base is None:
        raise LeavesDirectoryError(errno.EXDEV, f"a link to {target}, which is outside of its directory", str(path))
    return _read_beneath(base, target.relative_to(base), max_bytes, path)


def read_contained(directory: Path, name: str, max_bytes: int, description: str) -> bytes:
    """Read a file as `read_contained_bytes` does, with an error that a user can act on.

    Args:
        description: what the file should be, for the message.
    Raises:
        InputError: the name leads out of the directory, or there is no such file that can be read.
    """
    path = directory / name
    try:
        return read_contained_bytes(directory, name, max_bytes)
    except LeavesDirectoryError as error:
        expected = f"{description}, in {directory} itself: copy it there, or name the directory in which it is"
        raise bad_input(path, name, error.strerror, expected) from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise bad_input(path, name, "no such file", description) from error
    except OSError as error:
        raise bad_input(path, name, words_of(error), description) from error


def read_contained_json(directory: Path, name: str, description: str) -> dict[str, Any]:
    """Read a JSON object from a file of a directory.

    Args:
        description: what the file should be, for the message.
    Raises:
        InputError: as `read_contained`, or the file does not hold a JSON object in which every key stands once.
    """
    path, content = directory / name, read_contained(directory, name, MAX_JSON_BYTES, description)
    if found := lfs_pointer(content):
        raise bad_input(path, name, found, description)
    if content.startswith(codecs.BOM_UTF8):
        raise bad_input(path, name, "a byte order mark", "UTF-8 text that begins with {")
    with reading(path, name, "valid JSON"):
        value = parse_json(content.decode("utf-8"))
    if not isinstance(value, dict):
        raise bad_input(path, name, f"a JSON {type(value).__name__}", "a JSON object")
    return value


def _read_beneath(base: Path, inner: Path, max_bytes: int, shown: Path) -> bytes:
    """Read a file below a directory, where no part of the way is a link any more.

    Raises:
        OSError: some part is one now, or the file is not regular, or too long.
    """
    if not inner.parts:
        raise OSError(errno.EISDIR, "a directory", str(shown))
    folder = os.open(base, _FOLDER_FLAGS)
    try:
        for part in inner.parts[:-1]:
            deeper = os.open(part, _FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = deeper
        # Looked at before: opening a device can do something by itself.
        _require_regular(os.stat(inner.name, dir_fd=folder, follow_symlinks=False), max_bytes, shown)
        file = os.open(inner.name, _FILE_FLAGS | os.O_NOFOLLOW, dir_fd=folder)
    finally:
        os.close(folder)
    with open(file, "rb") as content:
        _require_regular(os.fstat(file), max_bytes, shown)
        found = content.read(max_bytes + 1)
    if len(found) > max_bytes:  # it grows, or is a file of the kernel's, which have no size
        raise OSError(errno.EFBIG, f"more than {max_bytes} bytes", str(shown))
    return found


def _require_regular(found: os.stat_result, max_bytes: int, shown: Path) -> None:
    """Raise an `OSError` for what is no plain file, or too long."""
    if not stat.S_ISREG(found.st_mode):
        words = next((words for is_kind, words in _KINDS if is_kind(found.st_mode)), "a device")
        raise OSError(errno.EINVAL, words, str(shown))
    if found.st_size > max_bytes:
        raise OSError(errno.EFBIG, f"{found.st_size} bytes, more than {max_bytes}", str(shown))


def _resolved(path: Path) -> Path:
    """A path without links; one that cannot be followed, as in a circle, is left from there on.

    Raises:
        OSError: no file can have that name.
    """
    try:
        return Path(os.path.realpath(path))
    except ValueError as error:  # a zero byte
        raise OSError(errno.EINVAL, str(error), str(path)) from None


def _base_of(root: Path, target: Path) -> Path | None:
    """The directory to which a file may belong: the resolved root, or the blobs beside it in the hub's cache."""
    if target.is_relative_to(root):
        return root
    for snapshot in (root, *root.parents):
        if snapshot.parent.name == "snapshots" and _HUB_REPOSITORY.fullmatch(snapshot.parent.parent.name):
            blobs = snapshot.parent.parent / "blobs"
            return blobs if target.parent == blobs and _HUB_BLOB.fullmatch(target.name) else None
    return None
