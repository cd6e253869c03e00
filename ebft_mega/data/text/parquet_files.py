"""Read text documents from Parquet files, row group after row group, a few rows at a time.

Only the named columns are read. A row group that is damaged is an error, never a shorter one.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ebft_mega.data.text.bounded_reading import open_regular
from ebft_mega.data.text.parquet_columns import (
    Column,
    column_problems,
    columns_of,
    read_columns,
    reason_of,
    text_buffer,
    value_of,
)
from ebft_mega.data.text.parquet_pages import measure_pages
from ebft_mega.data.text.text_files import (
    LONG_DOCUMENTS,
    NO_TEXT,
    NOT_UTF8,
    UNREADABLE,
    WRONG_FIELD,
    BadText,
    ReadOptions,
    TextDocument,
    decode_text,
)
from ebft_mega.errors import EbftError, Problem
from ebft_mega.io.parse_boundary import is_of_parser, reading, words_of

if TYPE_CHECKING:
    import pyarrow.parquet as pq

PARQUET_MAGIC, ENCRYPTED_MAGIC = b"PAR1", b"PARE"
COMPLETE_FILE = "a complete Parquet file"
# At the end of the file: the length of the footer, and the magic bytes.
_TAIL_BYTES = 8
# Of the footer, which is in memory several times larger; one of a thousand row groups of ten columns has 1 MiB.
_MAX_FOOTER_BYTES = 1 << 25
_MAX_CONTAINER, _MAX_SCHEMA_LEVELS = 1_000_000, 100
_BATCH_ROWS, _BATCH_BYTES = 64, 1 << 25
_READ_BYTES = 1 << 20
_MAX_LIST_VALUES = 1 << 24  # of one column of one row group


@dataclass(frozen=True)
class ParquetLayout:
    """What the footer of a Parquet file says of it."""

    columns: tuple[Column, ...]  # of the top level
    group_rows: tuple[int, ...]  # of each row group
    group_bytes: tuple[int, ...]  # of each row group: what the columns that are read unpack to


def parquet_layout(file: Path, options: ReadOptions) -> ParquetLayout:
    """Read the footer of a Parquet file.

    Args:
        file: to read.
        options: which columns are read.

    Raises:
        InputError: the footer is damaged or beyond all bounds.
    """
    with reading(file, "--input", COMPLETE_FILE), open_regular(file) as stream:
        parquet = _opened(file, stream)
        columns = columns_of(parquet.schema_arrow)
        wanted = {*read_columns(columns, options)}
        metadata = parquet.metadata
        groups = range(metadata.num_row_groups)
        return ParquetLayout(
            columns,
            tuple(metadata.row_group(number).num_rows for number in groups),
            tuple(_unpacked_bytes(file, metadata, number, wanted) for number in groups),
        )


def read_parquet(
    file: Path,
    path: str,
    options: ReadOptions,
    groups: range,
    left_out: Counter[str] | None = None,
) -> Iterator[TextDocument | BadText]:
    """Read the documents of row groups; a row without a text gives a `BadText` in its place.

    The path of a document is that of the file with the number of its row, which counts from 1.

    Memory: the largest page of each column that is read, and some rows of together 32 MiB or one.

    Args:
        file: to read.
        path: of the file, relative to the input.
        options: which columns are read, and how long texts may be.
        groups: numbers of the row groups. Also where there are none, the columns are looked at.
        left_out: takes the number of documents that are too long.
    """
    place = ""
    try:
        with open_regular(file) as stream:
            parquet = _opened(file, stream)
            columns = columns_of(parquet.schema_arrow)
            for problem in column_problems(file, columns, options):
                reason = reason_of(problem, options)
                yield BadText(problem, path, reason, is_file=True)
                return
            row = sum(parquet.metadata.row_group(number).num_rows for number in range(groups.start))
            for group in groups:
                if not parquet.metadata.row_group(group).num_rows:  # of a table without rows; it may have no page
                    continue
                place = f": row group {group}"
                for record in _Rows(stream, parquet, group, read_columns(columns, options)).records():
                    row += 1
                    document = _document(record, f"{file}: row {row}", f"{path}:{row}", options)
                    if document is not None:
                        yield document
                    elif left_out is not None:
                        left_out[LONG_DOCUMENTS] += 1
    except BaseException as error:
        if isinstance(error, EbftError) or not is_of_parser(error):
            raise
        problem = Problem(f"{file}{place}", "file", words_of(error), COMPLETE_FILE)
        yield BadText(problem, path, UNREADABLE, is_file=True)


class _Rows:
    """The rows of one row group as records."""

    def __init__(self, stream: BinaryIO, parquet: "pq.ParquetFile", group: int, names: list[str]):
        self._parquet, self._group, self._names = parquet, group, names
        self._batch_rows = self._bounded_rows(stream)

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield each row: values of the columns by their names, texts as scalars that nothing has copied."""
        count = 0
        batches = self._parquet.iter_batches(self._batch_rows, [self._group], self._names, use_threads=False)
        for batch in batches:
            columns = [(name, batch.column(name)) for name in self._names]
            for number in range(batch.num_rows):
                yield {name: column[number] for name, column in columns}
            count += batch.num_rows
        declared = self._parquet.metadata.row_group(self._group).num_rows
        if count != declared:
            raise ValueError(f"{count} of {declared} rows")

    def _bounded_rows(self, stream: BinaryIO) -> int:
        """How many rows are read at a time, after the sizes of all pages were looked at."""
        group = self._parquet.metadata.row_group(self._group)
        wanted = {*self._names}
        longest = 1
        end_of_pages = os.fstat(stream.fileno()).st_size - _TAIL_BYTES
        for number in range(group.num_columns):
            chunk = group.column(number)
            if chunk.path_in_schema.split(".")[0] not in wanted and chunk.path_in_schema not in wanted:
                continue
            if chunk.file_path:
                raise ValueError("a column that lies in another file")
            begin = chunk.data_page_offset
            if chunk.has_dictionary_page and chunk.dictionary_page_offset:
                begin = min(begin, chunk.dictionary_page_offset)
            end = begin + chunk.total_compressed_size
            if not len(PARQUET_MAGIC) <= begin <= end <= end_of_pages:
                raise ValueError(
                    f"a column from offset {begin} to {end} in a file of {end_of_pages + _TAIL_BYTES} bytes"
                )
            pages = measure_pages(stream.fileno(), begin, end, chunk.compression != "UNCOMPRESSED")
            if "." in chunk.path_in_schema and pages.num_values > _MAX_LIST_VALUES:
                raise ValueError(f"lists of together {pages.num_values} values, where {_MAX_LIST_VALUES} are the most")
            longest = max(longest, pages.value_bytes)
        return min(_BATCH_ROWS, max(1, _BATCH_BYTES // longest))


def _document(record: dict[str, Any], where: str, path: str, options: ReadOptions) -> TextDocument | BadText | None:
    """The document of a row; None if it is too long."""
    expected = f"a text in the column {options.text_key!r}"
    content = text_buffer(record[options.text_key])
    if content is None:
        return BadText(Problem(where, options.text_key, "null", expected), path, NO_TEXT)
    if content.size > options.max_document_bytes:
        return None
    fields = {}
    others = {options.licence_key, *options.keep_keys, *options.group_keys}
    for name in (name for name in record if name in others):  # in an order: of two bad ones the first is named
        try:
            fields[name] = value_of(record[name])
        except UnicodeDecodeError as error:
            return BadText(Problem(where, name, words_of(error), "UTF-8 text"), path, NOT_UTF8)
        except ValueError as error:
            return BadText(Problem(where, name, str(error), "a value that JSON has"), path, WRONG_FIELD)
    return decode_text(content.to_pybytes(), where, path, fields, options)


def _unpacked_bytes(file: Path, metadata: "pq.FileMetaData", group: int, wanted: set[str]) -> int:
    """What the wanted columns of a row group unpack to, as its footer says, within what is possible."""
    row_group = metadata.row_group(group)
    chunks = (row_group.column(number) for number in range(row_group.num_columns))
    return sum(
        max(0, chunk.total_uncompressed_size) for chunk in chunks if chunk.path_in_schema.split(".")[0] in wanted
    )


def _opened(file: Path, stream: BinaryIO) -> "pq.ParquetFile":
    """A file as pyarrow reads it, after its footer was looked at; each process parses a footer once.

    Raises:
        ValueError: this is no Parquet file that can be read.
    """
    import pyarrow

    # What the library's own pools hold back is several times what a page takes.
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    status = os.fstat(stream.fileno())
    metadata = _metadata(file, status.st_size, status.st_mtime_ns, status.st_ino)
    return _of_library(stream, metadata=metadata, buffer_size=_READ_BYTES, page_checksum_verification=True)


@lru_cache(maxsize=1)
def _metadata(file: Path, size: int, changed: int, inode: int) -> "pq.FileMetaData":
    with open_regular(file) as stream:
        _require_footer(stream, size)
        parquet = _of_library(
            stream,
            thrift_string_size_limit=_MAX_FOOTER_BYTES,
            thrift_container_size_limit=_MAX_CONTAINER,
            schema_depth_limit=_MAX_SCHEMA_LEVELS,
        )
        return parquet.metadata


def _of_library(stream: BinaryIO, **options: Any) -> "pq.ParquetFile":
    from pyarrow.parquet import ParquetFile

    return ParquetFile(stream, pre_buffer=False, arrow_extensions_enabled=False, **options)


def _require_footer(stream: BinaryIO, size: int) -> None:
    """Compare the length of a footer with its file, before it is believed.

    Raises:
        ValueError: it cannot be, or the file is no Parquet file.
    """
    first = os.pread(stream.fileno(), len(PARQUET_MAGIC), 0)
    tail = os.pread(stream.fileno(), _TAIL_BYTES, max(0, size - _TAIL_BYTES))
    if ENCRYPTED_MAGIC in (first, tail[4:]):
        raise ValueError("an encrypted Parquet file")
    if first != PARQUET_MAGIC:
        raise ValueError("no Parquet file: it does not begin with PAR1")
    if tail[4:] != PARQUET_MAGIC:
        raise ValueError("a truncated Parquet file: it does not end with PAR1")
    footer_bytes = int.from_bytes(tail[:4], "little")
    if footer_bytes > size - _TAIL_BYTES - len(PARQUET_MAGIC):
        raise ValueError(f"a footer of {footer_bytes} bytes in a file of {size}")
    if footer_bytes > _MAX_FOOTER_BYTES:
        raise ValueError(f"a footer of {footer_bytes} bytes, where {_MAX_FOOTER_BYTES} are the most")
