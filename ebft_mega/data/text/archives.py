"""Read text documents from webdataset tar shards; a damaged or truncated shard is an error, never a shorter one.

Webdataset's own reader stops silently at a damaged header or at the end of a truncated file. Here a shard is read
up to its end-of-archive mark, and everything else is reported as a problem. A changed byte within a text is found
only if it makes the text invalid UTF-8: a tar file has a checksum for each header and none for contents.

Members are not decoded by their suffix, as webdataset does: only the text and one `.json` member are read.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from ebft_mega.data.text.bounded_reading import open_regular
from ebft_mega.data.text.tar_members import BLOCK_BYTES, DamagedArchiveError, Member, read_members
from ebft_mega.data.text.text_files import (
    LONG_DOCUMENTS,
    NO_JSON_OBJECT,
    OTHER_MEMBERS,
    UNREADABLE,
    UNUSABLE_SAMPLE,
    BadText,
    ReadOptions,
    TextDocument,
    decode_text,
    parse_json_line,
)
from ebft_mega.errors import Problem
from ebft_mega.io.parse_boundary import words_of

KEY_AND_SUFFIX = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
_WEBDATASETS_OWN = re.compile(r"__[^/]*__")
_RECORD_SUFFIX = "json"
_END_MARK_BYTES = 2 * BLOCK_BYTES
_CHUNK_BYTES = 1 << 20
_MAX_SAMPLE_MEMBERS = 1000  # of one key, one after another


@dataclass
class _Sample:
    """Consecutive members with the same key."""

    key: str
    suffixes: list[str] = field(default_factory=list)
    text: bytes | None = None
    record: bytes | None = None
    is_long: bool = False  # too long to be read


class _Walk:
    """The samples of an archive one after another, and where the last member ended."""

    def __init__(self, stream: BinaryIO, options: ReadOptions, left_out: Counter[str]):
        self._stream = stream
        self._options = options
        self._left_out = left_out
        self.end = 0

    def samples(self) -> Iterator[_Sample | BadText]:
        """Yield each sample, and in the place of each unusable member what is wrong with it."""
        sample: _Sample | None = None
        for member in read_members(self._stream):
            self.end = member.end
            if member.is_folder or _WEBDATASETS_OWN.fullmatch(member.name):  # names for its own members
                self._left_out[OTHER_MEMBERS] += not member.is_folder
                continue
            match = KEY_AND_SUFFIX.fullmatch(member.name)
            if match is None or not member.is_file or member.is_sparse:
                yield _unusable(member)
                continue
            key, suffix = match[1], match[2].lower()
            if sample is None or sample.key != key:
                if sample is not None:
                    yield sample
                sample = _Sample(key)
            if len(sample.suffixes) == _MAX_SAMPLE_MEMBERS:
                raise DamagedArchiveError(self.end, f"more than {_MAX_SAMPLE_MEMBERS} members of one sample")
            self._add(sample, suffix, member)
        if sample is not None:
            yield sample

    def _add(self, sample: _Sample, suffix: str, member: Member) -> None:
        sample.suffixes.append(suffix)
        options = self._options
        if suffix == options.text_member.lower():
            sample.is_long |= member.size > options.max_document_bytes
            sample.text = b"" if sample.is_long else self._contents(member)
        if suffix == _RECORD_SUFFIX and options.reads_records:
            sample.is_long |= member.size > options.max_record_bytes
            sample.record = None if sample.is_long else self._contents(member)
        if suffix not in (options.text_member.lower(), _RECORD_SUFFIX):
            self._left_out[OTHER_MEMBERS] += 1

    def _contents(self, member: Member) -> bytes:
        self._stream.seek(member.begin)
        data = self._stream.read(member.size)
        if len(data) != member.size:  # the file has become shorter
            raise DamagedArchiveError(member.begin, f"{len(data)} of {member.size} bytes of a member")
        return data


def read_text_archive(
    file: Path, path: str, options: ReadOptions, left_out: Counter[str] | None = None
) -> Iterator[TextDocument | BadText]:
    """Read the documents of a text webdataset shard; a sample without text gives a `BadText` in its place.

    A key is the member's path up to the first dot of its last part, as in webdataset; members that follow
    each other with one key are one sample. Other members of a sample are not read.

    Args:
        file: an uncompressed tar file.
        path: of the file, relative to the input.
        options: the suffix of the text, what is kept of the sample's `.json` member, and how much is read.
        left_out: takes the number of members that are not read, folders left aside, and of documents that are too long.
    """
    counts = Counter[str]() if left_out is None else left_out
    expected = "tar members up to the end-of-archive mark"
    try:
        with open_regular(file) as stream:
            walk = _Walk(stream, options, counts)
            for sample in walk.samples():
                if isinstance(sample, BadText):
                    yield _placed(sample, file, path)
                elif sample.is_long:
                    counts[LONG_DOCUMENTS] += 1
                else:
                    document = _document(sample, f"{file}:{sample.key}", f"{path}:{sample.key}", options)
                    if document is None:
                        counts[LONG_DOCUMENTS] += 1
                    else:
                        yield document
            found = what_ends(stream, walk.end)
            if found:
                problem = Problem(f"{file}: offset {walk.end}", "file", found, expected)
                yield BadText(problem, path, UNREADABLE, is_file=True)
    except DamagedArchiveError as error:
        problem = Problem(f"{file}: offset {error.offset}", "file", str(error), expected)
        yield BadText(problem, path, UNREADABLE, is_file=True)
    except OSError as error:
        problem = Problem(str(file), "file", words_of(error), "a complete tar file")
        yield BadText(problem, path, UNREADABLE, is_file=True)


def _unusable(member: Member) -> BadText:
    kind = "a name without key and suffix" if member.is_file else "no regular file"
    found = "a sparse file" if member.is_sparse else kind
    problem = Problem(member.name, "member", found, "files named KEY.SUFFIX")
    return BadText(problem, member.name, UNUSABLE_SAMPLE)


def _document(sample: _Sample, where: str, path: str, options: ReadOptions) -> TextDocument | BadText | None:
    if len(set(sample.suffixes)) < len(sample.suffixes):
        found, expected = f"suffixes {', '.join(sample.suffixes)}", "each suffix once in a sample"
        return BadText(Problem(where, "member", found, expected), path, UNUSABLE_SAMPLE)
    if sample.text is None:
        found, expected = f"suffixes {', '.join(sample.suffixes)}", f"a member {options.text_member!r} in each sample"
        return BadText(Problem(where, options.text_member, found, expected), path, UNUSABLE_SAMPLE)
    record: object = {}
    if sample.record is not None:
        try:
            record, _ = parse_json_line(sample.record, options.encoding_fallback)
        except (ValueError, RecursionError) as error:
            return BadText(Problem(where, _RECORD_SUFFIX, words_of(error), "a JSON object"), path, NO_JSON_OBJECT)
    if not isinstance(record, dict):
        found = f"a JSON {type(record).__name__}"
        return BadText(Problem(where, _RECORD_SUFFIX, found, "a JSON object"), path, NO_JSON_OBJECT)
    return decode_text(sample.text, where, path, record, options)


def _placed(bad: BadText, file: Path, path: str) -> BadText:
    problem = Problem(f"{file}:{bad.path}", bad.problem.key, bad.problem.found, bad.problem.expected)
    return BadText(problem, f"{path}:{bad.path}", bad.reason)


def what_ends(stream: BinaryIO, offset: int) -> str | None:
    """Describe what is wrong after an archive's last member, which ends at `offset`; None where nothing is."""
    stream.seek(offset)
    first = stream.read(_END_MARK_BYTES)
    if any(first[:BLOCK_BYTES]):
        return "a damaged or cut member header"
    if len(first) < _END_MARK_BYTES:
        return "the end of the file"
    while first:
        if any(first):
            return "more data after the end-of-archive mark"
        first = stream.read(_CHUNK_BYTES)
    return None
