"""Measure what the pages of a Parquet column unpack to, before any of them is unpacked.

The library believes the headers of pages: it takes as much memory as they say. Here they are read first (Thrift's
compact protocol), and compared with the file.
"""

import os
from dataclasses import dataclass
from typing import Any

from ebft_mega.data.text.compression import FREELY_UNPACKED_BYTES, MAX_UNPACKED_RATIO

# A page is in memory whole. Writers make pages of 1 MiB, or of 1,024 values, where those are longer.
MAX_PAGE_BYTES = 1 << 29
# Of a header, which may hold the smallest and largest value of its page.
_HEADER_BYTES, _MAX_HEADER_BYTES = 1 << 12, 1 << 22
_DATA_PAGE, _INDEX_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = range(4)
# Fields of a page's header, and of the header of its kind within it.
_KIND, _UNPACKED, _PACKED = 1, 2, 3
_OF_KIND = {_DATA_PAGE: (5, 2), _DICTIONARY_PAGE: (7, 2), _DATA_PAGE_V2: (8, 4)}  # and the field of its encoding
_NUM_VALUES = 1
_DICTIONARY_ENCODINGS = (2, 8)
_DELTA_BYTE_ARRAY = 7  # each value begins as the one before it
_DEEPEST_HEADER = 8


class DamagedPageError(ValueError):
    """The header of a page is damaged, or says what no file of its size holds."""


@dataclass(frozen=True)
class ColumnPages:
    """What the pages of a column of one row group unpack to."""

    page_bytes: int = 0  # the largest page
    value_bytes: int = 0  # of a value, where it is longest: the mean of its page, or all that it could refer to
    num_values: int = 0  # in all pages, elements of lists each as one


def measure_pages(descriptor: int, begin: int, end: int, compressed: bool = True) -> ColumnPages:
    """Read the header of each page of a column of one row group.

    Args:
        descriptor: of the open file.
        begin: of its first page, bytes.
        end: of its last page.
        compressed: whether pages may unpack to another size than they have.

    Raises:
        DamagedPageError: a header is damaged, or its page is larger than `MAX_PAGE_BYTES`, than the column, or than
            anything that so few bytes hold.
        OSError: the file cannot be read.
    """
    largest = value_bytes = dictionary_bytes = num_values = 0
    at = begin
    while at < end:
        header, header_bytes = _header(descriptor, at, end)
        packed, unpacked = (header.get(field) for field in (_PACKED, _UNPACKED))
        at += header_bytes
        if not isinstance(packed, int) or not isinstance(unpacked, int) or packed < 0 or unpacked < 0:
            raise DamagedPageError(f"no size of the page before offset {at}")
        if packed > end - at:
            raise DamagedPageError(f"{end - at} of {packed} bytes of a page at offset {at}")
        if not compressed and unpacked != packed:
            raise DamagedPageError(f"a page of {unpacked} bytes in {packed}, not compressed, at offset {at}")
        if unpacked > min(MAX_PAGE_BYTES, max(FREELY_UNPACKED_BYTES, MAX_UNPACKED_RATIO * packed)):
            raise DamagedPageError(f"a page of {unpacked} bytes in {packed} at offset {at}")
        at += packed
        largest = max(largest, unpacked)
        field, encoding_field = _OF_KIND.get(header.get(_KIND, -1), (0, 0))
        own = header.get(field)
        if not isinstance(own, dict):
            continue
        if header[_KIND] == _DICTIONARY_PAGE:
            dictionary_bytes = max(dictionary_bytes, unpacked)
            continue
        values = own.get(_NUM_VALUES) or 0
        num_values += max(0, values)
        encoding = own.get(encoding_field)
        if encoding == _DELTA_BYTE_ARRAY:
            value_bytes = max(value_bytes, unpacked)
        elif encoding not in _DICTIONARY_ENCODINGS:
            value_bytes = max(value_bytes, unpacked // max(1, values))
    return ColumnPages(largest, max(value_bytes, dictionary_bytes), num_values)


def _header(descriptor: int, at: int, end: int) -> tuple[dict[int, Any], int]:
    """The header of the page at `at`, and its bytes."""
    most = _HEADER_BYTES
    while True:
        content = os.pread(descriptor, min(most, end - at), at)
        reader = _Compact(content)
        try:
            return reader.struct(), reader.at
        except IndexError:
            if len(content) < most or most >= _MAX_HEADER_BYTES:
                raise DamagedPageError(f"no complete header of a page at offset {at}") from None
            most *= 8
        except ValueError as error:
            raise DamagedPageError(f"no header of a page at offset {at}: {error}") from None


class _Compact:
    """Whole numbers and structs of Thrift's compact protocol; texts are passed over, and lists are none of a header's.

    Reading beyond the end is an `IndexError`.
    """

    def __init__(self, content: bytes):
        self._content = content
        self.at = 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """The fields of a struct by their numbers."""
        if depth > _DEEPEST_HEADER:
            raise ValueError("structs that are nested too deeply")
        fields: dict[int, Any] = {}
        number = 0
        while first := self._byte():
            number = number + (first >> 4) if first >> 4 else self._signed()
            fields[number] = self._value(first & 15, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):  # true, false
            return None
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._signed()
        if kind == 7:
            return self._skip(8)
        if kind == 8:
            return self._skip(self._number())
        if kind == 12:
            return self.struct(depth + 1)
        raise ValueError(f"a field of kind {kind}")

    def _byte(self) -> int:
        value = self._content[self.at]
        self.at += 1
        return value

    def _skip(self, num_bytes: int) -> None:
        self.at += num_bytes
        if self.at > len(self._content):
            raise IndexError

    def _number(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a number of more than 64 bits")

    def _signed(self) -> int:
        value = self._number()
        return (value >> 1) ^ -(value & 1)
