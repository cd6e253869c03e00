"""Output directories that appear complete or not at all."""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ebft_mega.data.inputs import bad_input


@contextmanager
def new_directory(path: Path, marker: str, overwrite: bool) -> Iterator[Path]:
    """A temporary directory that takes the name `path` when the block ends, and is removed when it fails.

    Args:
        path: the directory to make.
        marker: a file that every such directory holds; an existing directory without it is never replaced.
        overwrite: replace an existing directory of the same kind.

    Raises:
        InputError: something stands at `path` that may not be replaced.
    """
    path = path.absolute()
    _refuse_other_contents(path, marker, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _hidden_sibling(path)
    temporary.mkdir()
    try:
        yield temporary
        _put_in_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
    if not path.exists():
        temporary.rename(path)
        return
    # Two renames, so that at no moment a half-deleted directory has the name.
    old = _hidden_sibling(path)
    path.rename(old)
    temporary.rename(path)
    shutil.rmtree(old)


def _hidden_sibling(path: Path) -> Path:
    """An unused name on the same file system, so that a rename moves nothing."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")
