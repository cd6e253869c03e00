"""Read text documents from plain files and from JSON lines."""

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ebft_mega.data.text.bounded_reading import open_regular, read_at_most, read_line, skip_line
from ebft_mega.data.text.compression import CutFileError, open_lines
from ebft_mega.data.text.decoding import decoded
from ebft_mega.data.text.document_groups import group_of_record, nearest_group, wanted_keys
from ebft_mega.errors import Problem
from ebft_mega.io.json_text import parse_json
from ebft_mega.io.parse_boundary import words_of

ARCHIVE_SUFFIX = ".tar"
SOURCE_SUFFIXES = (".tar.gz", ".tgz", ".tar.zst", ".zip")  # archives of source
_CHUNK_BYTES = 1 << 22
_FIRST_LINE_BYTES = 1 << 24  # of a file whose name does not say that it holds JSON lines
# To tokenize a document, sentencepiece takes 43 times its size.
MAX_DOCUMENT_BYTES = 16 << 20
# JSON writes most texts in less than three times as many bytes (as ASCII, a letter of two bytes takes six).
_RECORD_RATIO, _RECORD_BYTES = 3, 1 << 20
MAX_LICENCE_CHARACTERS = 1000
MAX_FIELDS_BYTES = 1 << 20  # of what is kept of a record, as JSON
MAX_FIELD_LEVELS = 100
_LONGEST_KEY = 100  # of those that a wrong one is compared with

# Why a document is left out with `--skip-bad`: `BadText.reason`.
NOT_UTF8 = "not UTF-8"
NO_JSON_OBJECT = "no JSON object"
NO_TEXT = "no text under the key"
WRONG_FIELD = "a field of the wrong type"
LONG_FIELD = "a field that is too long"
UNUSABLE_SAMPLE = "a sample without one text"
NO_GROUP = "no key of a group"
UNREADABLE = "unreadable or damaged files"

# What is left out without being bad: keys of the counts that readers are given.
BLANK_LINES = "blank lines"
OTHER_MEMBERS = "other members of archives"
LONG_DOCUMENTS = "documents that are too long"


@dataclass(frozen=True)
class ReadOptions:
    """What is taken from a JSON line or a webdataset sample."""

    text_key: str = "text"  # of a JSON line
    text_member: str = "txt"  # of a webdataset sample
    licence_key: str | None = None  # of a JSON line or a sample's `.json` member
    keep_keys: tuple[str, ...] = ()  # of the same, copied into the dataset
    max_document_bytes: int = MAX_DOCUMENT_BYTES  # of the text as UTF-8; longer ones are left out and not read
    # Members of the same: the first of them that a record has names the group which is not divided; one must be there.
    group_keys: tuple[str, ...] = ()
    encoding_fallback: str | None = None  # of text that is not UTF-8, one of `ENCODINGS`; None refuses such text

    @property
    def max_record_bytes(self) -> int:
        """Of a JSON line; a longer one is left out like the document that it may hold."""
        return _RECORD_RATIO * self.max_document_bytes + _RECORD_BYTES

    @property
    def reads_records(self) -> bool:
        """Whether anything of a sample's `.json` member is used."""
        return bool(self.licence_key or self.keep_keys or self.group_keys)


@dataclass(frozen=True)
class TextDocument:
    """One text and where it comes from."""

    text: str
    sha256: bytes  # of the text as UTF-8
    path: str  # relative to the input, with the line of a JSONL file or the key in an archive
    licence: str | None = None  # None where the document does not name its own
    fields: Mapping[str, object] = field(default_factory=dict)  # `ReadOptions.keep_keys`
    group: tuple[str, str] | None = None  # the one of `ReadOptions.group_keys` that its record has, and what it says
    encoding: str | None = None  # None is UTF-8

    @property
    def num_bytes(self) -> int:
        """Size of the text as UTF-8."""
        return len(self.text.encode())


@dataclass(frozen=True)
class BadText:
    """A document that cannot be used, or a file that cannot be read to its end."""

    problem: Problem
    path: str  # as in TextDocument
    reason: str  # why it is left out with `--skip-bad`
    is_file: bool = False  # the rest of the file could not be read: an unknown number of documents is missing


def read_text_file(
    file: Path, path: str, options: ReadOptions, left_out: Counter[str] | None = None
) -> TextDocument | BadText | None:
    """Read a text file exactly: line ends, NUL characters and byte-order marks stay as they are.

    Args:
        file: whose text is the document.
        path: of the file, relative to the input.
        options: how much is read.
        left_out: takes the number of documents that are too long.

    Returns:
        None for a document that is too long.
    """
    try:
        content = read_at_most(file, options.max_document_bytes)
    except OSError as error:
        return BadText(Problem(str(file), "text", words_of(error), "a readable file"), path, UNREADABLE, is_file=True)
    if content is None:
        if left_out is not None:
            left_out[LONG_DOCUMENTS] += 1
        return None
    own = ReadOptions(max_document_bytes=options.max_document_bytes, encoding_fallback=options.encoding_fallback)
    document = decode_text(content, str(file), path, options=own)  # no record comes with it
    if document is None and left_out is not None:
        left_out[LONG_DOCUMENTS] += 1
    return document


def decode_text(
    content: bytes,
    where: str,
    path: str,
    record: Mapping[str, object] | None = None,
    options: ReadOptions | None = None,
) -> TextDocument | BadText | None:
    """Make a document of bytes: UTF-8, or what `ReadOptions.encoding_fallback` says; None if its text is too long.

    Args:
        content: the text.
        where: what it was read from, for messages; a bad byte's line is added.
        path: see `TextDocument`.
        record: fields that came with the text.
        options: which of them are kept, and the encoding of what is not UTF-8.
    """
    options = options or ReadOptions()
    try:
        text, encoding = decoded(content, options.encoding_fallback)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{content[error.start]:02x} at offset {error.start}"
        expected = "UTF-8 text"
        if options.encoding_fallback is not None:
            expected += f", or {options.encoding_fallback} text without zero bytes"
        return BadText(Problem(f"{where}:{line}", "text", found, expected), path, NOT_UTF8)
    if encoding is not None:
        content = text.encode()
        if len(content) > options.max_document_bytes:
            return None
    return _with_fields(text, hashlib.sha256(content).digest(), where, path, record or {}, options, encoding)


def first_record_keys(file: Path, fallback: str | None = None) -> list[str] | None:
    """Keys of the JSON object on the first line that is not blank; None where there is no such object.

    Args:
        file: plain, or compressed with gzip or zstandard as its name says.
        fallback: `ReadOptions.encoding_fallback`.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        with open_lines(file) as lines:
            while (line := lines.readline(_FIRST_LINE_BYTES)) and not line.strip():
                continue
        record, _ = parse_json_line(line, fallback)
    except (CutFileError, ValueError, RecursionError):
        return None
    return sorted(record) if isinstance(record, dict) else None


def read_jsonl(
    file: Path,
    path: str,
    options: ReadOptions,
    begin: int = 0,
    end: int | None = None,
    first_line: int | None = 0,
    left_out: Counter[str] | None = None,
) -> Iterator[TextDocument | BadText]:
    """Read the documents of a JSONL file; a bad line gives a `BadText` in its place. Blank lines are left out.

    Args:
        file: JSON lines, plain or compressed with gzip or zstandard.
        path: of the file, relative to the input.
        options: which members of an object are read.
        begin, end: only lines whose first byte lies in this range; plain files alone can be read in ranges.
        first_line: number of lines before `begin`. With None they are counted only when a bad line is found; the
            line numbers in the paths of other documents are then wrong.
        left_out: takes the number of blank lines.
    """
    number = 0
    most = options.max_record_bytes
    try:
        with open_lines(file) as lines:
            position = begin
            if begin:
                lines.seek(begin - 1)
                position += skip_line(lines, None if end is None else end - begin + 1) - 1
            while end is None or position < end:
                line, num_bytes = read_line(lines, most)
                if not num_bytes:
                    return
                number += 1
                position += num_bytes
                if line is None:
                    if left_out is not None:
                        left_out[LONG_DOCUMENTS] += 1
                    continue
                if not line.strip():
                    if left_out is not None:
                        left_out[BLANK_LINES] += 1
                    continue
                document = _parse_line(line, file, path, (first_line or 0) + number, options)
                if isinstance(document, BadText) and first_line is None:
                    first_line = count_lines(file, 0, begin)
                    document = _parse_line(line, file, path, first_line + number, options)
                if document is not None:
                    yield document
                elif left_out is not None:
                    left_out[LONG_DOCUMENTS] += 1
    except OSError as error:
        expected = error.expected if isinstance(error, CutFileError) else "a readable file"
        line_number = (first_line or 0) + number + 1
        problem = Problem(f"{file}:{line_number}", "file", words_of(error), expected)
        yield BadText(problem, f"{path}:{line_number}", UNREADABLE, is_file=True)


def count_lines(file: Path, begin: int, end: int) -> int:
    """Count the lines of a plain file whose first byte lies in a byte range, `end` at most the file's size.

    Reads the range, about 1 GB a second.
    """
    if end <= begin:
        return 0
    count = int(begin == 0)  # elsewhere a line begins after a line end
    with open_regular(file) as content:
        content.seek(max(0, begin - 1))
        remaining = end - 1 - max(0, begin - 1)
        while remaining > 0 and (chunk := content.read(min(_CHUNK_BYTES, remaining))):
            count += chunk.count(b"\n")
            remaining -= len(chunk)
    return count


def parse_json_line(line: bytes, fallback: str | None = None) -> tuple[Any, str | None]:
    """Parse the JSON of a line, or of a sample's record; a byte order mark before it, which old editors write, is none.

    Args:
        line: UTF-8, or text of the fallback's encoding.
        fallback: see `decoded`.

    Returns:
        What it holds, and the encoding: None for UTF-8.

    Raises:
        ValueError: it is not JSON of which every reader makes the same.
        RecursionError: it is nested too deeply.
    """
    text, encoding = decoded(line, fallback, "utf-8-sig")
    return parse_json(text, half_pairs=True), encoding


def _parse_line(line: bytes, file: Path, name: str, number: int, options: ReadOptions) -> TextDocument | BadText | None:
    """The document of a line; None if it is too long."""
    where, path, key = f"{file}:{number}", f"{name}:{number}", options.text_key
    expected = f"a JSON object with a string {key!r}"
    try:
        record, encoding = parse_json_line(line, options.encoding_fallback)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, a key twice, numbers beyond all bounds
        return BadText(Problem(where, key, words_of(error), expected), path, NO_JSON_OBJECT)
    if not isinstance(record, dict) or not isinstance(record.get(key), str):
        reason = NO_TEXT if isinstance(record, dict) else NO_JSON_OBJECT
        return BadText(_no_text(where, key, record, expected), path, reason)
    try:
        content = record[key].encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"a lone surrogate at character {error.start}"
        return BadText(Problem(where, key, found, "valid Unicode text"), path, NOT_UTF8)
    if len(content) > options.max_document_bytes:
        return None
    return _with_fields(record[key], hashlib.sha256(content).digest(), where, path, record, options, encoding)


def _no_text(where: str, key: str, record: object, expected: str) -> Problem:
    """A line that is no object with a string under the key: it names the keys that are there."""
    if not isinstance(record, dict) or key in record:
        found = record[key] if isinstance(record, dict) else record
        return Problem(where, key, f"a JSON {type(found).__name__}", expected)
    near = difflib.get_close_matches(key, [name for name in record if len(name) < _LONGEST_KEY], 1)
    found = f"the keys {', '.join(sorted(record))}" if record else "no key at all"
    return Problem(where, key, found, f"{expected} (--text-key names another one)", *near)


def _with_fields(
    text: str,
    digest: bytes,
    where: str,
    path: str,
    record: Mapping[str, object],
    options: ReadOptions,
    encoding: str | None,
) -> TextDocument | BadText:
    """The document with the licence and the fields that its record holds."""
    licence = record.get(options.licence_key) if options.licence_key else None
    if isinstance(licence, list) and all(isinstance(item, str) for item in licence):
        licence = ", ".join(licence)
    if not isinstance(licence, str | None):
        found = f"a JSON {type(licence).__name__}"
        problem = Problem(where, str(options.licence_key), found, "a string or a list of strings")
        return BadText(problem, path, WRONG_FIELD)
    if licence and len(licence) > MAX_LICENCE_CHARACTERS:
        found = f"{len(licence)} characters"
        problem = Problem(where, str(options.licence_key), found, f"at most {MAX_LICENCE_CHARACTERS} characters")
        return BadText(problem, path, LONG_FIELD)
    fields = {key: record[key] for key in options.keep_keys if key in record}
    too_much = _too_much(fields)
    if too_much:
        expected = f"at most {MAX_FIELDS_BYTES} bytes of JSON, of {MAX_FIELD_LEVELS} levels"
        return BadText(Problem(where, ", ".join(fields), too_much, expected), path, LONG_FIELD)
    group = group_of_record(record, options.group_keys) if options.group_keys else None
    if isinstance(group, str):
        near = nearest_group(options.group_keys[0], list(record)) if len(options.group_keys) == 1 else ""
        return BadText(Problem(where, "--split-by", group, wanted_keys(options.group_keys), near), path, NO_GROUP)
    return TextDocument(text, digest, path, licence or None, fields, group, encoding)


def _too_much(fields: Mapping[str, object]) -> str | None:
    """Why the kept members of a record are not written into a dataset, if they are not."""
    if not fields:
        return None
    level: list[object] = list(fields.values())
    for _ in range(MAX_FIELD_LEVELS):
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [value for values in inner for value in values]
    if level:
        return f"more than {MAX_FIELD_LEVELS} levels"
    num_bytes = len(json.dumps(fields))
    return f"{num_bytes} bytes" if num_bytes > MAX_FIELDS_BYTES else None
