"""Open plain, gzip or zstandard files for reading lines; a truncated file is an error, never a shorter file."""

import gzip
import io
import zlib
from pathlib import Path
from typing import IO, Any

GZIP_SUFFIX = ".gz"
ZSTANDARD_SUFFIX = ".zst"
_CHUNK_BYTES = 1 << 18
_LARGEST_WINDOW_BYTES = 1 << 31  # what `zstd --long=31` writes


class CutFileError(OSError):
    """A compressed file that is empty, ends early or is damaged."""


def open_lines(file: Path) -> IO[bytes]:
    """Open a file for reading bytes, unpacked if its name ends in `.gz` or `.zst`.

    Reading raises `CutFileError` where the compressed data ends early or its checksum differs. (gzip always
    carries a checksum, zstandard if it was written with one.)

    Raises:
        OSError: the file cannot be opened.
    """
    if file.name.endswith(GZIP_SUFFIX):
        return io.BufferedReader(_GzipBytes(file), _CHUNK_BYTES)
    if file.name.endswith(ZSTANDARD_SUFFIX):
        return io.BufferedReader(_ZstandardBytes(file), _CHUNK_BYTES)
    return file.open("rb")


class _GzipBytes(io.RawIOBase):
    """Unpacked bytes of a gzip file. An empty file, which the standard library reads as empty text, is refused."""

    def __init__(self, file: Path):
        self._is_empty = file.stat().st_size == 0
        self._gzip = gzip.open(file, "rb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._is_empty:
            raise CutFileError("an empty file")
        try:
            return self._gzip.readinto(buffer)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise CutFileError(str(error)) from error

    def close(self) -> None:
        self._gzip.close()
        super().close()


class _ZstandardBytes(io.RawIOBase):
    """Unpacked bytes of a zstandard file, frame after frame.

    The library's own stream reader takes the end of the file for the end of a frame, so a truncated file would
    look complete.
    """

    def __init__(self, file: Path):
        from zstandard import ZstdDecompressor

        self._decompressor = ZstdDecompressor(max_window_size=_LARGEST_WINDOW_BYTES)
        self._file = file.open("rb")
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

        packed = self._packed or self._file.read(_CHUNK_BYTES)
        self._packed = b""
        if not packed:
            if self._frame is not None or not self._read_any:
                raise CutFileError("the end of the file inside a frame" if self._read_any else "an empty file")
            return False
        self._read_any = True
        if self._frame is None:
            self._frame = self._decompressor.decompressobj()
        try:
            self._unpacked = memoryview(self._frame.decompress(packed))
        except ZstdError as error:
            raise CutFileError(str(error)) from error
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, None
        return True

    def close(self) -> None:
        self._file.close()
        super().close()
