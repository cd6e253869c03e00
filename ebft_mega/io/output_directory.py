"""Output directories that appear only when they are complete; work that was stopped can be resumed."""

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from ebft_mega.errors import InputError
from ebft_mega.io.input_errors import bad_input
from ebft_mega.io.standard_streams import print_line

_IDENTITY_NAME = "identity.json"
_LOCK_NAME = "lock"
_RESULT_NAME = "result"
_TOKEN_BYTES = 4  # of the names of temporary directories

Permissions = Literal["private", "group", "umask"]
_WITHHELD: dict[Permissions, int] = {"private": 0o077, "group": 0o007}
_umask_at_start = os.umask(0o077)  # the system tells it only by setting another one
os.umask(_umask_at_start)


def limit_permissions(permissions: Permissions) -> None:
    """Decide who may use what this process, and every process that it starts, makes from now on.

    A directory that is renamed keeps its mode, and directories that exist keep theirs.

    Args:
        permissions: `private`: its owner alone (directories 0700, files 0600), whatever the umask; `group`: the group,
            too (0770, 0660); `umask`: whoever the umask leaves with which the process was started.
    """
    os.umask(_WITHHELD.get(permissions, _umask_at_start))


@contextmanager
def new_directory(path: Path, marker: str, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary directory that is renamed to `path` when the block ends, and removed when it fails.

    Args:
        path: the directory to make.
        marker: a file that every such directory holds; an existing directory without it is never replaced.
        overwrite: replace an existing directory of the same kind.

    Raises:
        InputError: something stands at `path` that may not be replaced.
    """
    path = path.absolute()
    refuse_other_contents(path, marker, overwrite)
    temporary = _hidden_sibling(path)
    _make_directory(temporary, path)
    try:
        yield temporary
        _put_in_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def unfinished_directory(path: Path, marker: str, overwrite: bool, identity: str) -> Iterator[tuple[Path, Path]]:
    """Yield a hidden directory beside `path` that outlives this process, so that the next one can resume its work.

    When the block ends, the second directory is renamed to `path` and the rest is removed. An `InputError` removes
    everything; any other error, a signal or a loss of power leaves it as it is.

    Args:
        path: the directory to make.
        marker: see `new_directory`.
        overwrite: see `new_directory`.
        identity: text that names the work, such as a hash of its inputs and options. What work of another identity
            has left is removed, with a note on standard error.

    Yields:
        The directory for intermediate results, and within it the one that becomes `path` (it may not exist yet).

    Raises:
        InputError: something stands at `path` that may not be replaced, another process is making `path`, or the
            file system has no locks.
    """
    path = path.absolute()
    refuse_other_contents(path, marker, overwrite)
    partial = path.with_name(f".{path.name}.partial")
    _make_directory(partial, path)
    with _lock_held(partial / _LOCK_NAME, path):
        _keep_only_same_work(partial, identity)
        try:
            yield partial, partial / _RESULT_NAME
        except InputError:
            shutil.rmtree(partial)
            raise
        except BaseException:
            print_line(f"note: what is done stays in {partial}; the same command resumes it")
            raise
        # A process that is killed from here on leaves nothing that the next one could resume.
        (partial / _IDENTITY_NAME).unlink()
        _put_in_place(partial / _RESULT_NAME, path)
        shutil.rmtree(partial)


def _make_directory(directory: Path, path: Path) -> None:
    """Make a directory, and those above it, for what becomes `path`."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise bad_input("--output", str(path), f"{error.filename}: {error.strerror}", "a place to write to") from error


@contextmanager
def _lock_held(lock_file: Path, path: Path) -> Iterator[None]:
    """Hold the lock of the process that makes `path`; the system releases it however the process ends.

    Raises:
        InputError: another process holds it, or held it until now and has removed the file, or the file system has
            no locks.
    """
    # Not the package's lock by the existence of a file, which a process that is killed would leave behind.
    lock = FileLock(lock_file, blocking=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise bad_input("--output", str(path), "another process that is making it", "one process at a time") from None
    except OSError as error:
        if error.filename is not None:  # the file could not be opened
            raise
        found = f"a file system without locks ({error.strerror})"
        raise bad_input("--output", str(lock_file.parent), found, "one with locks, such as a local disk") from error
    try:
        yield
    finally:
        lock.release()


def _keep_only_same_work(partial: Path, identity: str) -> None:
    """Remove what an earlier process has left unless it was at the work of this identity."""
    identity_file = partial / _IDENTITY_NAME
    content = json.dumps({"identity": identity})
    remains = [item for item in partial.iterdir() if item.name != _LOCK_NAME]
    if identity_file.is_file() and identity_file.read_text() == content:
        print_line(f"note: resuming what an earlier process left in {partial}")
        return
    if remains:
        print_line(f"note: inputs or options are not those of {partial}; starting anew")
    # First, so that remains which are removed only in part are never resumed.
    identity_file.unlink(missing_ok=True)
    for item in remains:
        if item.is_dir():
            shutil.rmtree(item)
        else:
            item.unlink(missing_ok=True)
    identity_file.write_text(content)


def refuse_other_contents(path: Path, marker: str, overwrite: bool) -> None:
    """Raise what `new_directory` would raise for the same arguments."""
    try:
        _refuse_other_contents(path, marker, overwrite)
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise bad_input("--output", str(path), error.strerror or error, "a place to write to") from error


def _refuse_other_contents(path: Path, marker: str, overwrite: bool) -> None:
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_dir():
        raise bad_input("--output", str(path), "a file", "a directory to make")
    if not any(path.iterdir()):
        return
    if not (path / marker).is_file():
        expected = f"a new or empty directory, or an earlier result (with {marker}) to replace"
        raise bad_input("--output", str(path), "other files", expected)
    if not overwrite:
        raise bad_input("--output", str(path), "an earlier result", "a new directory, or --overwrite")


def _put_in_place(temporary: Path, path: Path) -> None:
    """Rename a directory to `path`, in place of one that may stand there."""
    if not path.exists():
        temporary.rename(path)
        return
    # Two renames, so that a directory which is deleted only in part never has the name.
    old = _hidden_sibling(path)
    path.rename(old)
    temporary.rename(path)
    shutil.rmtree(old)


def hidden_siblings(path: Path) -> list[Path]:
    """List what makers of `path` that were killed have left beside it: unfinished directories, and replaced ones.

    One that `new_directory` was about to put in place, or had just put out of it, is whole.
    """
    pattern = re.compile(re.escape(f".{path.name}.") + f"[0-9a-f]{{{2 * _TOKEN_BYTES}}}")
    try:
        return sorted(item for item in path.parent.iterdir() if pattern.fullmatch(item.name))
    except (FileNotFoundError, NotADirectoryError):
        return []


def discard_hidden_siblings(path: Path) -> None:
    """Delete what killed makers of `path` have left; only where nobody can be making it."""
    for item in hidden_siblings(path):
        shutil.rmtree(item, ignore_errors=True)


def _hidden_sibling(path: Path) -> Path:
    """An unused name on the same file system, so that a rename moves nothing."""
    return path.with_name(f".{path.name}.{secrets.token_hex(_TOKEN_BYTES)}")
