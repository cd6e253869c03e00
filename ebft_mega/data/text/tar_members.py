"""Walk the members of a tar archive that nobody vouches for. Memory: one header, and one long name.

The standard library's reader believes its headers: it reads a name of the length that the archive gives, expands the
holes of sparse files, goes back where a size is below 0, and to the end of its stack for headers that describe
headers. Here every size is compared with the file before anything is read, and what text shards have no use for is
named as such. Read are the formats of POSIX (ustar, pax) and GNU tar, as the standard library reads them.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK_BYTES = 512
# Of a long name or a set of pax records. Linux has no longer paths than 4 KiB.
MAX_EXTENSION_BYTES = 1 << 15
MAX_NAME_BYTES = 4096

_NAME, _SIZE, _CHECKSUM, _KIND = slice(0, 100), slice(124, 136), slice(148, 156), slice(156, 157)
_MAGIC, _PREFIX = slice(257, 263), slice(345, 500)
_POSIX_MAGIC = b"ustar\0"
_FILE_KINDS = (b"0", b"\0", b"7")
_DATALESS_KINDS = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes
_FOLDER, _SPARSE = b"5", b"S"
_LONG_NAME, _LONG_LINK, _GLOBAL_RECORDS = b"L", b"K", b"g"
_RECORDS = (b"x", b"X")
_OCTAL = re.compile(rb" *([0-7]*)[ \0]*(?:\0.*)?", re.DOTALL)
_RECORD = re.compile(rb"([0-9]{1,10}) ([^=]+)=", re.DOTALL)
_DIGITS = re.compile(rb"[0-9]{1,19}")


class DamagedArchiveError(ValueError):
    """A header that is damaged, or one that no archive of texts has; `offset` is the header's place in the file."""

    def __init__(self, offset: int, found: str):
        super().__init__(found)
        self.offset = offset


@dataclass(frozen=True)
class Member:
    """What the headers of a member say; `size` bytes of contents lie at `begin`, and are in the file."""

    name: str  # bytes that are not UTF-8 as surrogates, like names of files
    is_file: bool
    is_folder: bool
    is_sparse: bool  # holes are left out of the contents
    begin: int
    size: int

    @property
    def end(self) -> int:
        """Where the next header lies."""
        return self.begin + _padded(self.size)


@dataclass
class _Extension:
    """What the headers before a member's own say of it."""

    name: bytes | None = None
    size: int | None = None
    is_sparse: bool = False


def read_members(stream: BinaryIO, file_bytes: int | None = None) -> Iterator[Member]:
    """Yield the members of an archive; the caller may read the member meanwhile.

    Args:
        stream: an uncompressed file, or the bytes of a compressed one, of which positions are sought forwards only.
        file_bytes: its length, or what no archive reaches where that is not known. None: that of the file.

    It ends at the first block that is empty or cut: whether that is the end of the archive is for the caller to say.

    Raises:
        DamagedArchiveError: at the first header that is damaged or goes beyond all bounds.
    """
    file_bytes = os.fstat(stream.fileno()).st_size if file_bytes is None else file_bytes
    offset = 0
    extension = _Extension()
    is_extended = False
    while True:
        header = _read(stream, offset, BLOCK_BYTES)
        if len(header) < BLOCK_BYTES or not any(header):
            if is_extended:
                raise DamagedArchiveError(offset, "a long name or pax records without a member")
            return
        _require_checksum(header, offset)
        kind = header[_KIND]
        stored = _number(header[_SIZE], offset)
        is_extended = kind in (_LONG_NAME, _LONG_LINK, _GLOBAL_RECORDS, *_RECORDS)
        if is_extended:
            if stored > MAX_EXTENSION_BYTES:
                found = f"a long name or pax records of {stored} bytes, where {MAX_EXTENSION_BYTES} are the most"
                raise DamagedArchiveError(offset, found)
            content = _read(stream, offset + BLOCK_BYTES, stored)
            if len(content) < stored:
                raise DamagedArchiveError(offset, "the end of the file inside a long name or pax records")
            _extend(extension, kind, content, offset)
            offset += BLOCK_BYTES + _padded(stored)
            continue
        member = _member(header, extension, stored, offset)
        if member.begin + member.size > file_bytes:
            found = f"{file_bytes - member.begin} of {member.size} bytes of a member"
            raise DamagedArchiveError(offset, found)
        yield member
        offset = member.end
        extension = _Extension()


def _member(header: bytes, extension: _Extension, stored: int, offset: int) -> Member:
    kind = header[_KIND]
    name = extension.name
    if name is None:
        name = _text(header[_NAME])
        if header[_MAGIC] == _POSIX_MAGIC and (prefix := _text(header[_PREFIX])):
            name = prefix + b"/" + name
    if len(name) > MAX_NAME_BYTES:
        raise DamagedArchiveError(offset, f"a name of {len(name)} bytes, where {MAX_NAME_BYTES} are the most")
    is_folder = kind == _FOLDER or (kind == b"\0" and name.endswith(b"/"))
    has_contents = kind not in _DATALESS_KINDS and not is_folder
    size = (stored if extension.size is None else extension.size) if has_contents else 0
    if kind == _SPARSE and header[482]:  # more headers follow; what comes behind them cannot be found without these
        raise DamagedArchiveError(offset, "a sparse member with a long map of its holes")
    return Member(
        name.rstrip(b"/").decode("utf-8", "surrogateescape"),
        is_file=kind in _FILE_KINDS and not is_folder,
        is_folder=is_folder,
        is_sparse=kind == _SPARSE or extension.is_sparse,
        begin=offset + BLOCK_BYTES,
        size=size,
    )


def _extend(extension: _Extension, kind: bytes, content: bytes, offset: int) -> None:
    """Take up what a header that describes the next member says."""
    if kind == _LONG_LINK:
        return
    records = [(b"path", _text(content))] if kind == _LONG_NAME else _records(content, offset)
    for key, value in records:
        if key in (b"path", b"size"):
            # Readers differ in which one they take.
            if kind == _GLOBAL_RECORDS or (extension.name if key == b"path" else extension.size) is not None:
                raise DamagedArchiveError(offset, f"more than one {'name' if key == b'path' else 'size'} for a member")
            if key == b"path":
                extension.name = value
            elif _DIGITS.fullmatch(value):
                extension.size = int(value)
            else:
                raise DamagedArchiveError(offset, "a size that is no number")
        elif key.startswith(b"GNU.sparse."):
            extension.is_sparse = True


def _records(content: bytes, offset: int) -> Iterator[tuple[bytes, bytes]]:
    """Records `LENGTH KEY=VALUE` with a line end, each of LENGTH bytes."""
    at = 0
    while at < len(content) and content[at]:
        match = _RECORD.match(content, at)
        end = at + int(match[1]) if match else 0
        if not match or not match.end() < end <= len(content) or content[end - 1 : end] != b"\n":
            raise DamagedArchiveError(offset, "damaged pax records")
        yield match[2], content[match.end() : end - 1]
        at = end


def _number(field: bytes, offset: int) -> int:
    """A size: octal digits, or with the highest bit set a binary number."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    match = _OCTAL.fullmatch(field)
    if match is None:
        raise DamagedArchiveError(offset, "a size below 0" if field[0] == 0xFF else "a size that is no number")
    return int(match[1] or b"0", 8)


def _require_checksum(header: bytes, offset: int) -> None:
    match = _OCTAL.fullmatch(header[_CHECKSUM])
    rest = header[: _CHECKSUM.start] + b" " * 8 + header[_CHECKSUM.stop :]
    unsigned = sum(rest)
    signed = unsigned - 256 * sum(byte > 127 for byte in rest)  # what some old programs wrote
    if match is None or int(match[1] or b"0", 8) not in (unsigned, signed):
        raise DamagedArchiveError(offset, "a damaged or cut member header")


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _read(stream: BinaryIO, offset: int, num_bytes: int) -> bytes:
    stream.seek(offset)
    return stream.read(num_bytes)


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES
