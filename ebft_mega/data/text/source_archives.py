"""Read archives of source trees: each member a text, under its path. They are read and never unpacked to a disk."""

import io
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, BinaryIO, cast

from ebft_mega.data.text.archives import KEY_AND_SUFFIX, what_ends
from ebft_mega.data.text.bounded_reading import open_regular
from ebft_mega.data.text.compression import CutFileError, open_lines
from ebft_mega.data.text.listing import COMPILED_FOLDER, HIDDEN_FILES
from ebft_mega.data.text.tar_members import DamagedArchiveError, Member, read_members
from ebft_mega.data.text.text_files import (
    LONG_DOCUMENTS,
    SOURCE_SUFFIXES,
    UNREADABLE,
    BadText,
    ReadOptions,
    TextDocument,
    decode_text,
)
from ebft_mega.data.text.zip_members import ZipMember, open_zip, read_member
from ebft_mega.errors import EbftError, Problem
from ebft_mega.io.parse_boundary import is_of_parser, words_of

SOURCE, WEBDATASET = "source", "webdataset"
ZIP_SUFFIX = ".zip"
MEMBER_LINKS = "links in archives"
COMPILED_FILES = f"files in {COMPILED_FOLDER} folders"
SPECIAL_MEMBERS = "pipes and devices in archives"
_DAMAGED = "a damaged archive"
_LOOKED_AT = 200  # members of an archive, to tell what it holds
_SKIPPED_BYTES = 1 << 18
# Positions of a compressed archive that nothing reaches.
_NO_END = sys.maxsize


def is_source_archive(name: str) -> bool:
    """Whether a file is by its name an archive of source: packed tar files and zip files. A plain tar file may be."""
    return name.endswith(SOURCE_SUFFIXES)


def kind_of_tar(file: Path, text_member: str) -> tuple[str | None, str]:
    """What a plain tar file holds, as its first 200 members tell.

    Clearly a webdataset is one in which at least half of the samples (members that follow each other with one key) have
    a text. Clearly source is one without any such member, of which some lie in a folder.

    Args:
        file: the archive.
        text_member: suffix of the text in a webdataset.

    Returns:
        SOURCE, WEBDATASET, or None where it is neither; and what it looks like, in words. A file that cannot be read,
        or is empty, is a webdataset: reading it says what is wrong.
    """
    try:
        status = file.stat()
    except OSError:
        return WEBDATASET, _DAMAGED
    return _kind_of_tar(file, text_member, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1)  # each of the formats that have the suffix asks
def _kind_of_tar(file: Path, text_member: str, size: int, changed: int) -> tuple[str | None, str]:
    keys: list[str] = []
    texts: set[str] = set()
    files = folders = 0
    try:
        with open_regular(file) as stream:
            for number, member in enumerate(read_members(stream)):
                if number == _LOOKED_AT:
                    break
                folders += member.is_folder or "/" in member.name
                match = KEY_AND_SUFFIX.fullmatch(member.name)
                key, suffix = (match[1], match[2].lower()) if match else (member.name, "")
                files += member.is_file
                if member.is_file and (not keys or keys[-1] != key):
                    keys.append(key)
                if member.is_file and suffix == text_member.lower():
                    texts.add(key)
    except (OSError, DamagedArchiveError):
        return WEBDATASET, _DAMAGED
    words = f"{files} files in {len(keys)} samples, of which {len(texts)} have a {text_member!r} member"
    words += ", in folders" if folders else ", in no folder"
    if 2 * len(texts) >= len(keys):
        return WEBDATASET, words
    return (SOURCE if folders and not texts else None), words


def common_folder(file: Path) -> str:
    """The folder of an archive that all its texts lie in, as `a/b`; empty where there is none.

    Of a packed archive all is unpacked once, in small parts. Damage ends the look: reading the texts says what it is.
    """
    common: list[str] | None = None
    try:
        for parts in _folders_of_texts(file):
            if common is None:
                common = parts
            while parts[: len(common)] != common:
                common = common[:-1]
            if not common:
                break
    except BaseException as error:
        if not is_of_parser(error):
            raise
    return "/".join(common or ())


def member_path(name: str) -> str:
    """The path that the name of a member says, without what leads nowhere (`./`, `//`)."""
    return "/".join(_parts(name))


def _folders_of_texts(file: Path) -> Iterator[list[str]]:
    """The folders of each member that may be a text."""
    is_zip, is_packed = file.name.endswith(ZIP_SUFFIX), is_source_archive(file.name)
    with open_lines(file) if is_packed and not is_zip else open_regular(file) as opened:
        if is_zip:
            members: Iterable[Member | ZipMember] = open_zip(cast(BinaryIO, opened))[1]
        else:
            stream = cast(BinaryIO, _Forwards(opened) if is_packed else opened)
            members = read_members(stream, _NO_END if is_packed else None)
        for member in members:
            if not member.is_folder and not _reason_to_skip(member.name, member.is_file, 0, 0):
                yield _parts(member.name)[:-1]


_Choose = Callable[[str], str | None]


def read_source_archive(
    file: Path,
    path: str,
    options: ReadOptions,
    left_out: Counter[str] | None = None,
    choose: _Choose = lambda name: None,
) -> Iterator[TextDocument | BadText]:
    """Read the texts of an archive, in the order of its members; a member that is none gives a `BadText`.

    Left out and counted are hidden files, those in `__pycache__`, links, pipes, devices and long texts, as in a folder.

    Memory: one member of at most `options.max_document_bytes`, and the directory of a zip archive.

    Args:
        file: `.tar`, `.tar.gz`, `.tgz`, `.tar.zst` or `.zip`.
        path: of the file, relative to the input; documents add the member's name to it.
        options: how much is read.
        left_out: takes the numbers of members that are not read, by reason.
        choose: says of a member's name why it is not read, None if it is.
    """
    counts = Counter[str]() if left_out is None else left_out
    read = _zip_texts if file.name.endswith(ZIP_SUFFIX) else _tar_texts
    try:
        for name, content in read(file, options.max_document_bytes, counts, choose):
            where, place = f"{file}/{name}", f"{path}/{name}"
            if isinstance(content, bytes):
                document = decode_text(content, where, place, options=options)
                if document is None:
                    counts[LONG_DOCUMENTS] += 1
                else:
                    yield document
            else:
                yield BadText(Problem(where, "member", content, "a complete text"), place, UNREADABLE)
    except BaseException as error:
        if isinstance(error, EbftError) or not is_of_parser(error):
            raise
        place = f": offset {error.offset}" if isinstance(error, DamagedArchiveError) else ""
        expected = error.expected if isinstance(error, CutFileError) else "a complete archive of texts"
        yield BadText(Problem(f"{file}{place}", "file", words_of(error), expected), path, UNREADABLE, is_file=True)


def _parts(name: str) -> list[str]:
    return [part for part in re.split("/+", name) if part not in (".", "..", "")]


def _reason_to_skip(name: str, is_file: bool, size: int, most_bytes: int) -> str | None:
    parts = _parts(name)
    if any(part[0] == "." for part in parts):
        return HIDDEN_FILES
    if COMPILED_FOLDER in parts[:-1]:
        return COMPILED_FILES
    if not is_file:
        return MEMBER_LINKS
    return LONG_DOCUMENTS if size > most_bytes else None


def _tar_texts(
    file: Path, most_bytes: int, left_out: Counter[str], choose: _Choose
) -> Iterator[tuple[str, bytes | str]]:
    """Name and contents of each text; in the place of contents that cannot be used, what is wrong with them."""
    is_packed = is_source_archive(file.name)
    with open_lines(file) if is_packed else open_regular(file) as opened:
        stream = cast(BinaryIO, _Forwards(opened) if is_packed else opened)
        end = 0
        for member in read_members(stream, _NO_END if is_packed else None):
            end = member.end
            if member.is_folder:
                continue
            reason = _reason_to_skip(member.name, member.is_file, member.size, most_bytes) or choose(member.name)
            left_out.update([reason] if reason else [])
            if not reason:
                yield member.name, "a sparse file" if member.is_sparse else _contents(stream, member)
        if found := what_ends(stream, end):
            raise DamagedArchiveError(end, found)


def _contents(stream: BinaryIO, member: Member) -> bytes:
    stream.seek(member.begin)
    content = stream.read(member.size)
    if len(content) != member.size:
        raise DamagedArchiveError(member.begin, f"{len(content)} of {member.size} bytes of a member")
    return content


def _zip_texts(
    file: Path, most_bytes: int, left_out: Counter[str], choose: _Choose
) -> Iterator[tuple[str, bytes | str]]:
    """As `_tar_texts`."""
    with open_regular(file) as stream:
        archive, members = open_zip(stream)
        for member in members:
            if member.is_folder:
                continue
            reason = _reason_to_skip(member.name, member.is_file, member.size, most_bytes) or choose(member.name)
            left_out.update([reason] if reason else [])
            if reason:
                continue
            try:
                content: bytes | str = read_member(archive, member)
            except Exception as error:  # a member has a checksum of its own
                content = words_of(error)
            yield member.name, content


class _Forwards(io.RawIOBase):
    """A stream whose position moves forwards, or to within what was read last; all else is passed over in parts."""

    def __init__(self, stream: IO[bytes]):
        self._stream = stream
        self._at = 0
        self._last = b""  # what was read last, a header or the like
        self._again = b""  # the end of it, to be read once more

    def seek(self, position: int, whence: int = 0) -> int:
        """Move to a position, or to the end of the stream if that comes before."""
        if self._at - len(self._last) <= position < self._at:
            self._again = self._last[len(self._last) - (self._at - position) :]
            self._at = position
        while self._at < position and (part := self.read(min(_SKIPPED_BYTES, position - self._at))):
            self._last = part
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Read so many bytes, fewer at the end only."""
        again, self._again = self._again[:size], self._again[size:]
        content = again + self._stream.read(size - len(again)) if size > len(again) else again
        self._at += len(content)
        self._last = content
        return content
