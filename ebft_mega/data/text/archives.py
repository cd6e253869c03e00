"""Read text documents from webdataset tar shards; a damaged or truncated shard is an error, never a shorter one.

Webdataset's own reader stops silently at a damaged header or at the end of a truncated file. Here a shard is read
up to its end-of-archive mark, and everything else is reported as a problem. A changed byte within a text is found
only if it makes the text invalid UTF-8: a tar file has a checksum for each header and none for contents.

Members are not decoded by their suffix, as webdataset does: only the text and one `.json` member are read.
"""

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ebft_mega.data.text.text_files import (
    NO_JSON_OBJECT,
    OTHER_MEMBERS,
    UNREADABLE,
    UNUSABLE_SAMPLE,
    BadText,
    ReadOptions,
    TextDocument,
    decode_text,
)
from ebft_mega.errors import Problem

_KEY_AND_SUFFIX = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
_RECORD_SUFFIX = "json"
_END_MARK_BYTES = 2 * tarfile.BLOCKSIZE
_CHUNK_BYTES = 1 << 20


@dataclass
class _Sample:
    """Consecutive members with the same key."""

    key: str
    suffixes: list[str] = field(default_factory=list)
    text: bytes | None = None
    record: bytes | None = None


def read_text_archive(
    file: Path, path: str, options: ReadOptions, left_out: Counter[str] | None = None
) -> Iterator[TextDocument | BadText]:
    """Read the documents of a text webdataset shard; a sample without text gives a `BadText` in its place.

    A key is the member's path up to the first dot of its last part, as in webdataset; members that follow
    each other with one key are one sample. Other members of a sample are not read.

    Args:
        file: an uncompressed tar file.
        path: of the file, relative to the input.
        options: the suffix of the text, and what is kept of the sample's `.json` member.
        left_out: takes the number of members that are not read, folders left aside.
    """
    counts = Counter[str]() if left_out is None else left_out
    try:
        with file.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for sample in _samples(tar, options, counts):
                if isinstance(sample, BadText):
                    yield _placed(sample, file, path)
                else:
                    yield _document(sample, f"{file}:{sample.key}", f"{path}:{sample.key}", options)
            found = _what_ends(stream, tar.offset)
            if found:
                where, expected = f"{file}: offset {tar.offset}", "tar members up to the end-of-archive mark"
                yield BadText(Problem(where, "file", found, expected), path, UNREADABLE, is_file=True)
    except (tarfile.TarError, OSError, ValueError) as error:  # the last for numbers in a header that are none
        problem = Problem(str(file), "file", str(error), "a complete tar file")
        yield BadText(problem, path, UNREADABLE, is_file=True)


def _samples(tar: Any, options: ReadOptions, left_out: Counter[str]) -> Iterator[_Sample | BadText]:
    sample: _Sample | None = None
    while (member := tar.next()) is not None:
        tar.members.clear()  # kept by the library, one object for each member of the archive
        if member.isdir() or re.fullmatch(r"__[^/]*__", member.name):  # webdataset's names for its own members
            left_out[OTHER_MEMBERS] += not member.isdir()
            continue
        match = _KEY_AND_SUFFIX.fullmatch(member.name)
        if match is None or not member.isreg():
            found = f"{member.name!r}, {'a name without key and suffix' if member.isreg() else 'no regular file'}"
            yield BadText(Problem(member.name, "member", found, "files named KEY.SUFFIX"), member.name, UNUSABLE_SAMPLE)
            continue
        key, suffix = match[1], match[2].lower()
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = _Sample(key)
        sample.suffixes.append(suffix)
        if suffix in (options.text_member.lower(), _RECORD_SUFFIX):
            data = tar.extractfile(member).read()
            if len(data) != member.size:
                raise tarfile.ReadError(f"{member.name}: {len(data)} of {member.size} bytes")
            if suffix == options.text_member.lower():
                sample.text = data
            if suffix == _RECORD_SUFFIX:
                sample.record = data
        else:
            left_out[OTHER_MEMBERS] += 1
    if sample is not None:
        yield sample


def _document(sample: _Sample, where: str, path: str, options: ReadOptions) -> TextDocument | BadText:
    if len(set(sample.suffixes)) < len(sample.suffixes):
        found, expected = f"suffixes {', '.join(sample.suffixes)}", "each suffix once in a sample"
        return BadText(Problem(where, "member", found, expected), path, UNUSABLE_SAMPLE)
    if sample.text is None:
        found, expected = f"suffixes {', '.join(sample.suffixes)}", f"a member {options.text_member!r} in each sample"
        return BadText(Problem(where, options.text_member, found, expected), path, UNUSABLE_SAMPLE)
    record: object = {}
    if sample.record is not None and (options.licence_key or options.keep_keys):
        try:
            record = json.loads(sample.record)
        except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or an integer beyond Python's limit
            return BadText(Problem(where, _RECORD_SUFFIX, str(error), "a JSON object"), path, NO_JSON_OBJECT)
    if not isinstance(record, dict):
        found = f"a JSON {type(record).__name__}"
        return BadText(Problem(where, _RECORD_SUFFIX, found, "a JSON object"), path, NO_JSON_OBJECT)
    return decode_text(sample.text, where, path, record, options)


def _placed(bad: BadText, file: Path, path: str) -> BadText:
    problem = Problem(f"{file}:{bad.path}", bad.problem.key, bad.problem.found, bad.problem.expected)
    return BadText(problem, f"{path}:{bad.path}", bad.reason)


def _what_ends(stream: IO[bytes], offset: int) -> str | None:
    """Describe what is wrong after an archive's last member, which ends at `offset`; None where nothing is."""
    stream.seek(offset)
    first = stream.read(_END_MARK_BYTES)
    if any(first[: tarfile.BLOCKSIZE]):
        return "a damaged or cut member header"
    if len(first) < _END_MARK_BYTES:
        return "the end of the file"
    while first:
        if any(first):
            return "more data after the end-of-archive mark"
        first = stream.read(_CHUNK_BYTES)
    return None
