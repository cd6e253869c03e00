"""Walk the members of a zip archive that nobody vouches for, by Python's zipfile, after its directory was looked at.

The library reads a directory of any size, and members whose bytes overlap: a few of them can unpack to petabytes.
"""

import os
import stat
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from ebft_mega.data.text.compression import FREELY_UNPACKED_BYTES, MAX_UNPACKED_RATIO
from ebft_mega.data.text.tar_members import MAX_NAME_BYTES

ZIP_MAGICS = (b"PK\x03\x04", b"PK\x05\x06")
# Of the directory at the end of the archive, of which each member takes 46 bytes and its name.
_MAX_DIRECTORY_BYTES = 1 << 24
_END, _END_BYTES, _LONGEST_COMMENT = b"PK\x05\x06", 22, (1 << 16) - 1
_LOCATOR, _LOCATOR_BYTES, _LARGE_END_BYTES = b"PK\x06\x07", 20, 56
_MEMBER_HEADER_BYTES = 30
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 0x1


class DamagedZipError(ValueError):
    """A zip archive that is damaged, encrypted, or says what no archive of texts says."""


@dataclass(frozen=True)
class ZipMember:
    """What the directory says of a member."""

    name: str
    is_folder: bool
    is_file: bool  # no link
    size: int  # unpacked
    info: zipfile.ZipInfo


def open_zip(stream: BinaryIO) -> tuple[zipfile.ZipFile, list[ZipMember]]:
    """Read the directory of a zip archive, and compare it with the file.

    Raises:
        DamagedZipError: the directory is too large, members overlap, are encrypted or of one name, or would unpack to
            more than anything of this size.
        Exception: whatever the library raises for a damaged directory.
    """
    size = os.fstat(stream.fileno()).st_size
    directory_bytes = _directory_bytes(stream, size)
    if directory_bytes > min(size, _MAX_DIRECTORY_BYTES):
        raise DamagedZipError(f"a directory of {directory_bytes} bytes in an archive of {size}")
    archive = zipfile.ZipFile(stream)
    infos = archive.infolist()
    _require_apart(infos, archive.start_dir)
    names = {info.filename for info in infos}
    if len(names) < len(infos):
        raise DamagedZipError("two members of one name")
    if any(info.flag_bits & _ENCRYPTED for info in infos):
        raise DamagedZipError("encrypted members")
    if longest := max((len(name) for name in names if len(name) > MAX_NAME_BYTES), default=0):
        raise DamagedZipError(f"a name of {longest} characters, where {MAX_NAME_BYTES} are the most")
    unpacked = sum(info.file_size for info in infos)
    if unpacked > max(FREELY_UNPACKED_BYTES, MAX_UNPACKED_RATIO * size):
        raise DamagedZipError(f"members of together {unpacked} bytes in an archive of {size}")
    return archive, list(_members(infos))


def read_member(archive: zipfile.ZipFile, member: ZipMember) -> bytes:
    """Unpack a member and compare its checksum.

    Raises:
        DamagedZipError: it is packed by another method than deflate.
        Exception: whatever the library raises for damaged contents.
    """
    if member.info.compress_type not in _METHODS:
        raise DamagedZipError(f"a member that is packed by method {member.info.compress_type}")
    with archive.open(member.info) as content:
        found = content.read(member.size + 1)
    if len(found) != member.size:
        raise DamagedZipError(f"{len(found)} of {member.size} bytes of a member")
    return found


def _members(infos: list[zipfile.ZipInfo]) -> Iterator[ZipMember]:
    for info in infos:
        mode = info.external_attr >> 16
        is_file = not stat.S_IFMT(mode) or stat.S_ISREG(mode)
        yield ZipMember(info.filename.rstrip("/"), info.is_dir(), is_file, info.file_size, info)


def _require_apart(infos: list[zipfile.ZipInfo], end: int) -> None:
    """Raise a `DamagedZipError` where bytes of the archive belong to more than one member."""
    for info in sorted(infos, key=lambda info: info.header_offset, reverse=True):
        if not 0 <= info.header_offset <= info.header_offset + _MEMBER_HEADER_BYTES + info.compress_size <= end:
            raise DamagedZipError(f"members that overlap, or reach beyond offset {end}")
        end = info.header_offset


def _directory_bytes(stream: BinaryIO, size: int) -> int:
    """How long the directory says that it is."""
    begin = max(0, size - _END_BYTES - _LONGEST_COMMENT)
    tail = os.pread(stream.fileno(), size - begin, begin)
    at = tail.rfind(_END)
    if at < 0 or len(tail) - at < _END_BYTES:
        raise DamagedZipError("no directory at the end: truncated, or no zip archive")
    directory_bytes = int.from_bytes(tail[at + 12 : at + 16], "little")
    locator_at = begin + at - _LOCATOR_BYTES
    if locator_at >= 0 and os.pread(stream.fileno(), 4, locator_at) == _LOCATOR:
        # The library takes the larger record from right before its locator.
        record = os.pread(stream.fileno(), _LARGE_END_BYTES, max(0, locator_at - _LARGE_END_BYTES))
        directory_bytes = max(directory_bytes % 0xFFFFFFFF, int.from_bytes(record[40:48], "little"))
    return directory_bytes
