"""The manifest decides whether a checkpoint is whole: every file with its size and sha256, written last, read first.

`file_problems` and `read_listed` compare a folder with its manifest; a checkpoint without a manifest is broken.
"""

import errno
import hashlib
import heapq
import os
import stat
from collections.abc import Iterable
from io import FileIO
from pathlib import Path
from typing import Literal

from ebft_mega.errors import BrokenCheckpointError, Problem
from ebft_mega.io.durable import write_bytes
from ebft_mega.io.records import Count, InnerPath, Record, Sha256, parse_record

MANIFEST_NAME = "manifest.json"


class FileRecord(Record):
    """Size in bytes and checksum of one file."""

    bytes: Count
    sha256: Sha256


class Manifest(Record):
    """Every file of a checkpoint folder, beside the manifest itself, by its path in the folder."""

    version: Literal[1]
    step: Count  # optimizer steps done
    files: dict[InnerPath, FileRecord]


def write_manifest(directory: Path, manifest: Manifest) -> FileRecord:
    """Write the manifest of a folder, so that it outlives a loss of power when this returns.

    Args:
        directory: the folder, with all its other files in place.
    Returns:
        The manifest's own size and checksum: the latter identifies the checkpoint.
    Raises:
        OSError: the disk is full, for example.
    """
    return write_file(directory, MANIFEST_NAME, (manifest.model_dump_json(indent=1) + "\n").encode())


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of a folder; nothing else in the folder is opened.

    Raises:
        BrokenCheckpointError: there is none, or it is not whole.
        InputError: a newer version of this program has written it.
    """
    return parse_manifest(directory, read_manifest_bytes(directory))


def read_manifest_bytes(directory: Path) -> bytes:
    """The text of a folder's manifest.

    Raises:
        BrokenCheckpointError: there is none that can be read.
    """
    try:
        with _open_inside(directory, MANIFEST_NAME) as file:
            return file.read()
    except OSError as error:
        expected = "the list of the files of a complete checkpoint"
        problem = Problem(str(directory / MANIFEST_NAME), MANIFEST_NAME, _words(error), expected)
        raise BrokenCheckpointError([problem]) from None


def parse_manifest(directory: Path, text: bytes) -> Manifest:
    """The manifest of a folder, from its text.

    Raises:
        BrokenCheckpointError: it is not whole.
        InputError: a newer version of this program has written it.
    """
    manifest = parse_record(Manifest, text, str(directory / MANIFEST_NAME))
    if MANIFEST_NAME in manifest.files:
        problem = Problem(str(directory / MANIFEST_NAME), "files", MANIFEST_NAME, "the other files of the checkpoint")
        raise BrokenCheckpointError([problem])
    return manifest


def file_problems(directory: Path, manifest: Manifest, names: Iterable[str]) -> list[Problem]:
    """Compare files with the manifest: they exist, with the size and the checksum that it lists.

    Reads whole files. Communication: none; see `share_of_files`.

    Args:
        names: which of the manifest's files to look at.
    """
    return [problem for name in names for problem in _problem_of_file(directory, name, manifest.files[name])]


def read_listed(directory: Path, manifest: Manifest, name: str) -> bytes:
    """Read a small file whole and compare it with the manifest.

    Raises:
        BrokenCheckpointError: the manifest does not list the file, or it is missing or another one.
    """
    record = manifest.files.get(name)
    if record is None:
        problem = Problem(str(directory / MANIFEST_NAME), "files", f"no {name}", "every file of a checkpoint")
        raise BrokenCheckpointError([problem])
    content = b""
    problems = _size_problem(directory, name, record)
    if not problems:
        try:
            with _open_inside(directory, name) as file:
                content = file.read()
            problems = _checksum_problem(directory, name, record, hashlib.sha256(content).hexdigest())
        except OSError as error:
            problems = [_unreadable(directory, name, record, error)]
    if problems:
        raise BrokenCheckpointError(problems)
    return content


def unlisted_files(directory: Path, manifest: Manifest) -> list[str]:
    """Paths in the folder that the manifest does not list, sorted. Nothing reads such files."""
    found = []
    for parent, folders, files in os.walk(directory):
        linked = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        found += [Path(parent, name).relative_to(directory).as_posix() for name in [*files, *linked]]
    return sorted(set(found) - manifest.files.keys() - {MANIFEST_NAME})


def share_of_files(manifest: Manifest, rank: int, size: int) -> list[str]:
    """The files that one of `size` ranks is to check: every file falls to one rank, and bytes are balanced.

    The largest files come first, each to the rank that has the fewest bytes so far; no two ranks then differ by more
    than the largest file. Communication: none; all ranks compute the same distribution.
    """
    loads = [(0, index) for index in range(size)]
    names = []
    for name, record in sorted(manifest.files.items(), key=lambda item: (-item[1].bytes, item[0])):
        load, index = loads[0]
        heapq.heapreplace(loads, (load + record.bytes, index))
        if index == rank:
            names.append(name)
    return names


def write_file(directory: Path, name: str, content: bytes) -> FileRecord:
    """Write one file of a folder, so that it outlives a loss of power when this returns.

    A reader sees the old contents, if there were any, or the new ones.

    Args:
        directory: the folder; it and folders within it are made.
        name: path of the file in it.
    Returns:
        What the manifest says of the file.
    Raises:
        OSError: the disk is full, for example; an old file is then untouched.
    """
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, content)
    return FileRecord(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def _problem_of_file(directory: Path, name: str, record: FileRecord) -> list[Problem]:
    problems = _size_problem(directory, name, record)
    if problems:
        return problems
    try:
        with _open_inside(directory, name) as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return [_unreadable(directory, name, record, error)]
    return _checksum_problem(directory, name, record, checksum)


def _size_problem(directory: Path, name: str, record: FileRecord) -> list[Problem]:
    path = directory / name
    try:
        size = path.stat().st_size
    except OSError as error:
        return [_unreadable(directory, name, record, error)]
    return [] if size == record.bytes else [Problem(str(path), name, f"{size} bytes", f"{record.bytes} bytes")]


def _checksum_problem(directory: Path, name: str, record: FileRecord, found: str) -> list[Problem]:
    if found == record.sha256:
        return []
    return [Problem(str(directory / name), name, f"sha256 {found}", f"sha256 {record.sha256}")]


def _unreadable(directory: Path, name: str, record: FileRecord, error: OSError) -> Problem:
    return Problem(str(directory / name), name, _words(error), f"a file of {record.bytes} bytes")


def _open_inside(directory: Path, name: str) -> FileIO:
    """Open a plain file that lies in a folder, wherever links in its path may point.

    Raises:
        OSError: there is none, or it lies elsewhere, or opening it could block (a pipe).
    """
    path = directory / name
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(directory)):
        raise OSError(errno.EPERM, "a link out of the checkpoint folder", str(path))
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EPERM, "no plain file", str(path))
    return path.open("rb", buffering=0)


def _words(error: OSError) -> str:
    return "no such file" if isinstance(error, FileNotFoundError) else str(error.strerror or error)
