"""List the files below a folder, and count what is left out or followed on the way."""

import errno
import fnmatch
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ebft_mega.errors import InputError, Problem
from ebft_mega.io.contained_files import leaves
from ebft_mega.io.progress_bar import LongCount

COMPILED_FOLDER = "__pycache__"

# Why something is left out; keys of `Listing.left_out` and of `build.json`.
HIDDEN_FILES = "hidden files"
HIDDEN_FOLDERS = "hidden folders"
COMPILED_FOLDERS = f"{COMPILED_FOLDER} folders"
FOLDER_LINKS = "links to folders"
BROKEN_LINKS = "links that lead nowhere"
SPECIAL_FILES = "pipes, sockets and devices"
OTHER_NAMES = "files with other names"
OTHER_KINDS = "files of other kinds"
EARLIER_OUTPUT = "earlier output"
OUTSIDE_LINKS = "links that leave the input"
REPEATING_LINKS = "links to files that are read anyway"
# What is followed; key of `Listing.followed`.
FILE_LINKS = "links to files"

# What to do about `OUTSIDE_LINKS`.
TO_FOLLOW = f"{OUTSIDE_LINKS} are not followed: copy what they lead to into it, or name it as an input of its own"

# Of a link that names itself, directly or in a circle, or that leads through a file, or to a name that cannot exist.
_LEADS_NOWHERE = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG)


@dataclass(frozen=True)
class Listing:
    """The files below a folder."""

    files: tuple[Path, ...]  # sorted by their path relative to the folder
    left_out: Mapping[str, int] = field(default_factory=dict)  # by reason; a folder counts once, whatever it holds
    followed: Mapping[str, int] = field(default_factory=dict)
    unreadable: tuple[Problem, ...] = ()  # folders and files that could not be accessed


class Chooser(Protocol):
    """Says which files and folders of a folder are read. Paths are relative to that folder, with `/`."""

    def enter(self, folder: str, names: Iterable[str]) -> None:
        """Hear of a folder (with a slash at its end; empty for the first) and of all in it that is no folder."""

    def reason_to_skip_folder(self, path: str) -> str | None:
        """Why nothing of a folder is read, a key of `Listing.left_out`; None if something may be."""

    def reason_to_leave_out(self, path: str) -> str | None:
        """Why a file is not read, a key of `Listing.left_out`; None if it is."""


@dataclass(frozen=True)
class NameChooser:
    """Chooses by the name of a file alone."""

    pattern: str  # shell pattern

    def enter(self, folder: str, names: Iterable[str]) -> None:
        """Folders have no part in it."""

    def reason_to_skip_folder(self, path: str) -> str | None:
        """None: all folders are searched."""
        return None

    def reason_to_leave_out(self, path: str) -> str | None:
        """`OTHER_NAMES` for a name that does not match."""
        return None if fnmatch.fnmatchcase(path.rpartition("/")[2], self.pattern) else OTHER_NAMES


def list_files(directory: Path, chosen: str | Chooser = "*", output: Path | None = None) -> Listing:
    """List the files below a folder that are chosen.

    Left out and counted: hidden files and folders, `__pycache__`, links to folders (those within the folder are
    searched without them), links that lead nowhere or out of the folder, what is neither file nor folder (nothing is
    opened here), and what is not chosen. A link to a file within the folder, or to a blob of the repository in the
    hub's cache to which the folder belongs, is followed unless the file is listed anyway: no file is listed twice.

    Args:
        directory: the folder to search; it may be a link.
        chosen: shell pattern on the file name, such as `*.py`, or what decides by paths.
        output: a folder that is left out, because it holds what is made of the files.
    """
    found: list[Path] = []
    links: list[Path] = []
    left_out: Counter[str] = Counter()
    errors: list[OSError] = []
    result = os.path.realpath(output) if output else None
    chooser = NameChooser(chosen) if isinstance(chosen, str) else chosen
    looked_at = LongCount(f"names found in {directory}")
    for folder, subfolders, names in _folders(directory, errors):
        above = folder.relative_to(directory).as_posix() + "/" if folder != directory else ""
        chooser.enter(above, names)
        entered = []
        for name in subfolders:
            reason = _reason_to_skip_folder(Path(folder, name), result) or chooser.reason_to_skip_folder(above + name)
            left_out.update([reason] if reason else [])
            entered += [] if reason else [name]
        subfolders[:] = entered
        looked_at.add(len(subfolders))
        for name in names:
            looked_at.add()
            path = Path(folder, name)
            if name[0] == ".":
                left_out[HIDDEN_FILES] += 1
            elif reason := chooser.reason_to_leave_out(above + name):
                left_out[reason] += 1
            else:
                try:
                    reason = _reason_to_skip_file(path)
                except OSError as error:
                    errors.append(error)
                    continue
                left_out.update([reason] if reason else [])
                if not reason:
                    (links if path.is_symlink() else found).append(path)
    followed, reasons = _followed_links(directory, found, links)
    left_out.update(reasons)
    expected = "a file or folder that can be read"
    unreadable = tuple(Problem(str(error.filename), "--input", str(error.strerror), expected) for error in errors)
    files = _in_order(directory, [*found, *followed])
    return Listing(files, left_out, {FILE_LINKS: len(followed)} if followed else {}, unreadable)


def _folders(directory: Path, errors: list[OSError]) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Each folder with the names of its folders, which the caller may shorten, and of all else in it.

    `os.walk` calls itself for each level, and Python's stack is not as deep as a path may be.
    """
    waiting = [directory]
    while waiting:
        folder = waiting.pop()
        subfolders: list[str] = []
        names: list[str] = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    (subfolders if _is_folder(entry) else names).append(entry.name)
        except OSError as error:
            errors.append(error)
            continue
        yield folder, subfolders, names
        waiting += [folder / name for name in reversed(subfolders)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _followed_links(directory: Path, files: Iterable[Path], links: Iterable[Path]) -> tuple[list[Path], list[str]]:
    """The links to files within a folder that are listed under no other name, and why the others are left out."""
    listed = {os.path.realpath(path) for path in files} if links else set()
    followed, reasons = [], []
    for path in _in_order(directory, links):
        target = os.path.realpath(path)
        if leaves(directory, path) is not None:
            reasons.append(OUTSIDE_LINKS)
        elif target in listed:
            reasons.append(REPEATING_LINKS)
        else:
            listed.add(target)
            followed.append(path)
    return followed, reasons


def _in_order(directory: Path, paths: Iterable[Path]) -> tuple[Path, ...]:
    return tuple(sorted(paths, key=lambda path: path.relative_to(directory).as_posix()))


def readable_files(listing: Listing) -> tuple[Path, ...]:
    """The files of a listing.

    Raises:
        InputError: lists all folders and files that could not be accessed, because their documents would be missing.
    """
    if listing.unreadable:
        raise InputError(list(listing.unreadable))
    return listing.files


def in_words(counts: Mapping[str, int]) -> str:
    """Counts as one phrase, such as `hidden files: 3, links to folders: 1`; empty where there are none."""
    return ", ".join(f"{reason}: {count}" for reason, count in sorted(counts.items()) if count)


def total_counts(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sum of several counts by reason."""
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total)


def _reason_to_skip_folder(path: Path, output: str | None) -> str | None:
    if path.name[0] == ".":
        return HIDDEN_FOLDERS
    if path.name == COMPILED_FOLDER:
        return COMPILED_FOLDERS
    if os.path.islink(path):  # does not raise where the path is too long, as searching the folder will
        return FOLDER_LINKS
    return EARLIER_OUTPUT if output is not None and os.path.realpath(path) == output else None


def _reason_to_skip_file(path: Path) -> str | None:
    """None for a regular file, or a link to one.

    Raises:
        OSError: it cannot be said what it is.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if error.errno in _LEADS_NOWHERE:
            return BROKEN_LINKS
        raise
    if stat.S_ISDIR(mode):  # a link, made in the meantime
        return FOLDER_LINKS
    return None if stat.S_ISREG(mode) else SPECIAL_FILES
