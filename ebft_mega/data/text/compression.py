"""Open plain, gzip or zstandard files for reading lines; a truncated file is an error, never a shorter file.

A few bytes can be packed that unpack to terabytes. Here they are unpacked in small parts, and not beyond a multiple of
what the file has.
"""

import gzip
import io
import os
import zlib
from pathlib import Path
from typing import IO, Any, BinaryIO

from ebft_mega.data.text.bounded_reading import open_regular

GZIP_SUFFIX, GZIP_TAR_SUFFIX = ".gz", ".tgz"
ZSTANDARD_SUFFIX = ".zst"
# Texts are packed to between a third and a twentieth, logs that repeat themselves to a hundredth. A file may unpack to
# so many bytes at any rate, or to so many times its size.
FREELY_UNPACKED_BYTES = 1 << 26
MAX_UNPACKED_RATIO = 250
_CHUNK_BYTES = 1 << 18
# One byte of a frame unpacks to at most 32 KiB, all at once: four of a block that repeats a byte 128 Ki times.
_FRAME_CHUNK_BYTES = 1 << 11
_UNPACKED_CHUNK_BYTES = 1 << 16
# What `zstd --long=31` writes. Of a window only what has been unpacked takes memory.
_LARGEST_WINDOW_BYTES = 1 << 31


class CutFileError(OSError):
    """A compressed file that is empty, ends early or is damaged."""

    expected = "a complete compressed file"


class UnpackedSizeError(CutFileError):
    """A compressed file that holds far more than text of its size could."""

    expected = f"at most {MAX_UNPACKED_RATIO} times the size of the file (unpacked by other means, it is read)"


def open_lines(file: Path) -> IO[bytes]:
    """Open a file for reading bytes, unpacked if its name ends in `.gz`, `.tgz` or `.zst`.

    Reading raises `CutFileError` where the compressed data ends early or its checksum differs. (gzip always
    carries a checksum, zstandard if it was written with one.)

    Raises:
        OSError: the file cannot be opened.
    """
    if file.name.endswith((GZIP_SUFFIX, GZIP_TAR_SUFFIX)):
        return io.BufferedReader(_GzipBytes(open_regular(file)), _CHUNK_BYTES)
    if file.name.endswith(ZSTANDARD_SUFFIX):
        return io.BufferedReader(_ZstandardBytes(open_regular(file)), _CHUNK_BYTES)
    return open_regular(file)


class _Unpacked:
    """Count what a file unpacks to."""

    def __init__(self, file: BinaryIO):
        size = os.fstat(file.fileno()).st_size
        self._most = max(FREELY_UNPACKED_BYTES, MAX_UNPACKED_RATIO * size)
        self._found = f"more than {self._most} bytes in a file of {size}"
        self._bytes = 0

    def add(self, num_bytes: int) -> None:
        """Take in that so many more bytes were unpacked.

        Raises:
            UnpackedSizeError: they are too many.
        """
        self._bytes += num_bytes
        if self._bytes > self._most:
            raise UnpackedSizeError(self._found)


class _GzipBytes(io.RawIOBase):
    """Unpacked bytes of a gzip file. An empty file, which the standard library reads as empty text, is refused."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._is_empty = os.fstat(file.fileno()).st_size == 0
        self._gzip = gzip.GzipFile(fileobj=file, mode="rb")
        self._unpacked = _Unpacked(file)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._is_empty:
            raise CutFileError("an empty file")
        try:
            num_bytes = self._gzip.readinto(buffer)
            self._unpacked.add(num_bytes)
            return num_bytes
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise CutFileError(str(error)) from error

    def close(self) -> None:
        self._gzip.close()
        self._file.close()
        super().close()


class _ZstandardBytes(io.RawIOBase):
    """Unpacked bytes of a zstandard file, frame after frame.

    The library's own stream reader takes the end of the file for the end of a frame, so a truncated file would
    look complete.
    """

    def __init__(self, file: BinaryIO):
        from zstandard import ZstdDecompressor

        self._decompressor = ZstdDecompressor(max_window_size=_LARGEST_WINDOW_BYTES)
        self._file = file
        self._limit = _Unpacked(file)
        self._frame: Any = None  # being decoded; None between frames
        self._packed = b""  # read but not yet given to a frame
        self._unpacked = memoryview(b"")
        self._read_any = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            if not self._unpack_more():
                return 0
        num_bytes = min(len(buffer), len(self._unpacked))
        buffer[:num_bytes] = self._unpacked[:num_bytes]
        self._unpacked = self._unpacked[num_bytes:]
        return num_bytes

    def _unpack_more(self) -> bool:
        """Unpack one more chunk; False at the end of the file."""
        from zstandard import ZstdError

        packed = self._packed or self._file.read(_FRAME_CHUNK_BYTES)
        self._packed = b""
        if not packed:
            if self._frame is not None or not self._read_any:
                raise CutFileError("the end of the file inside a frame" if self._read_any else "an empty file")
            return False
        self._read_any = True
        self._unpacked = memoryview(b"")  # before more is unpacked, so that only one chunk is held
        if self._frame is None:
            self._frame = self._decompressor.decompressobj(write_size=_UNPACKED_CHUNK_BYTES)
        try:
            self._unpacked = memoryview(self._frame.decompress(packed))
        except ZstdError as error:
            raise CutFileError(str(error)) from error
        self._limit.add(len(self._unpacked))
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, None
        return True

    def close(self) -> None:
        self._file.close()
        super().close()
