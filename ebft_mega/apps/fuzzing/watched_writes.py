"""Note what this process writes, starts or connects to outside of the places that are meant for it."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_WRITING_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Events of the interpreter that change a path, with the number of paths that come first in their arguments.
_PATH_EVENTS = {
    **dict.fromkeys(("os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.chown", "os.utime"), 1),
    **dict.fromkeys(("os.rename", "os.link", "os.symlink", "shutil.copyfile", "shutil.move"), 2),
    **dict.fromkeys(("os.setxattr", "os.removexattr", "shutil.rmtree", "shutil.make_archive"), 1),
}
_FORBIDDEN_EVENTS = (
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn"),
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "pickle.find_class", "ctypes.dlopen", "os.putenv"),
)


class WatchedWrites:
    """Writes outside of a directory while a block runs, of which there is one for the whole process.

    The interpreter tells of what Python code does; a library in another language can write without a word.
    """

    def __init__(self) -> None:
        self.taken: list[str] = []  # in the last block, in words
        self._below: str | None = None
        sys.addaudithook(self._note)

    @contextlib.contextmanager
    def only_below(self, directory: Path) -> Iterator[None]:
        """Note whatever the block does that is not below a directory."""
        self.taken = []
        self._below = os.path.realpath(directory) + os.sep
        try:
            yield
        finally:
            self._below = None

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        below = self._below
        if below is None:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = isinstance(mode, str) and any(letter in mode for letter in "wax+")
            if (writes or (isinstance(flags, int) and flags & _WRITING_FLAGS)) and not _is_below(path, below):
                self.taken.append(f"open {path!r}")
        elif event in _PATH_EVENTS:
            paths = arguments[: _PATH_EVENTS[event]]
            self.taken += [f"{event} {path!r}" for path in paths if not _is_below(path, below)]
        elif event in _FORBIDDEN_EVENTS:
            self.taken.append(f"{event} {arguments!r:.200}")


def _is_below(path: Any, below: str) -> bool:
    """Whether a path lies in a directory; a descriptor was opened as one that does."""
    if isinstance(path, int) or path == os.devnull:
        return True
    try:
        return os.path.realpath(os.fsdecode(path)).startswith(below)
    except (ValueError, TypeError):  # no path that could be opened
        return True
