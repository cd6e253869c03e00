"""What a worker does with one work unit of a build: read and hash its documents, then tokenize those that stay.

The texts are read twice, since the number of a document in the dataset, and whether an equal one came before,
are known only when all have been read once. Reading costs little beside tokenizing.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ebft_mega.data.builder.array_files import write_array
from ebft_mega.data.builder.deduplication import DIGEST_BYTES
from ebft_mega.data.builder.shard_writer import ShardWriter
from ebft_mega.data.builder.skipped_list import SkippedList
from ebft_mega.data.builder.work_plan import FileRange, Plan, Reader
from ebft_mega.data.builder.worker_pool import Advance
from ebft_mega.data.text.text_files import BadText, TextDocument, count_lines
from ebft_mega.data.text.tokenizer import Tokenizer, load_tokenizer
from ebft_mega.errors import InputError, Problem
from ebft_mega.io.durable import flush_to_disk, write_bytes
from ebft_mega.io.input_errors import bad_input
from ebft_mega.io.parse_boundary import reading

# Of one work unit: a wrong --text-key makes every line of a dump a problem.
MAX_LISTED_PROBLEMS = 1000

NOT_WRITABLE = "a text that the tokenizer cannot write"  # why a document is left out with `--skip-bad`
_COUNTED_CHARACTERS = 1000  # of a licence's name, which is whatever a document says
_LISTED_CHANGED = 3  # of the documents that do not round-trip, of one work unit

# Names of a work unit's files say "part": builds that were stopped have them.
_RECORD_NAME = "part.json"
_OWN_RECORD = "a record of the build that was stopped; without its folder the build begins anew"
_INDEX_NAME = "index.npy"


@dataclass(frozen=True)
class Scan:
    """What the first reading of a work unit found."""

    documents: int  # with text that can be used
    empty: int
    bad: int
    problems: tuple[Problem, ...]  # the first of them
    lines: tuple[int, ...]  # of each file range that is cut, else 0
    left_out: dict[str, int]  # what is no document, by reason
    fields: dict[str, int]  # documents that have each of the named members of records
    skipped_ranges: tuple[int, ...]  # numbers of the file ranges that could not be read to their end, without documents


@dataclass(frozen=True)
class TokenizedUnit:
    """What the shards of a work unit hold."""

    first_document: int  # its number in the dataset
    shards: tuple[dict[str, Any], ...]  # `ShardEntry` fields
    max_token_id: int
    text_bytes: int
    licences: dict[str, int]  # documents of each
    sources: dict[str, int]
    skipped: dict[str, int]  # documents and files left out, by reason; its directory lists them
    not_round_trip: int  # documents whose tokens do not give back their text
    changed: tuple[str, ...]  # paths of the first of them

    @property
    def documents(self) -> int:
        """That its shards hold."""
        return sum(shard["documents"] for shard in self.shards)


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer, or where a worker process finds it."""

    tokenizer: Tokenizer | None
    directory: Path

    def load(self) -> Tokenizer:
        """The tokenizer; a process loads it once."""
        return self.tokenizer or _tokenizer_of_process(self.directory)


@dataclass(frozen=True)
class ScanJob:
    """A work unit, and the directory for its record."""

    reader: Reader
    work_unit: tuple[FileRange, ...]
    number: int
    directory: Path
    skip_bad: bool


@dataclass(frozen=True)
class TokenizeJob:
    """A work unit, and what the scan of all work units has found out about it."""

    reader: Reader
    work_unit: tuple[FileRange, ...]
    number: int
    directory: Path
    texts: TextEncoder
    shard_bytes: int
    first_document: int  # in the dataset
    first_lines: tuple[int, ...]  # lines before each file range in its file
    skipped_ranges: tuple[int, ...]  # `Scan.skipped_ranges`
    keep: np.ndarray  # bool [Scan.documents]
    skip_bad: bool


def unit_directory(directory: Path, number: int) -> Path:
    """Directory of the shards of a tokenized work unit; it appears when they are complete."""
    return directory / f"part-{number:06d}"


def load_scan(directory: Path, number: int) -> Scan | None:
    """The record of a work unit that has been scanned, None if it has not."""
    path = _scan_path(directory, number)
    if not path.is_file():
        return None
    with reading(path, path.name, _OWN_RECORD):
        fields = json.loads(path.read_bytes())
        problems = tuple(Problem(**problem) for problem in fields.pop("problems"))
        lines, skipped = tuple(fields.pop("lines")), tuple(fields.pop("skipped_ranges"))
        return Scan(problems=problems, lines=lines, skipped_ranges=skipped, **fields)


def load_digests(directory: Path, number: int) -> np.ndarray:
    """sha256 of the documents of a scanned work unit: uint8 [Scan.documents, 32], memory-mapped."""
    path = _scan_path(directory, number).with_suffix(".npy")
    with reading(path, path.name, _OWN_RECORD):
        return np.load(path, mmap_mode="r", allow_pickle=False)


def load_tokenized(directory: Path, number: int) -> TokenizedUnit | None:
    """The record of a work unit that has been tokenized, None if it has not."""
    path = unit_directory(directory, number) / _RECORD_NAME
    if not path.is_file():
        return None
    with reading(path, path.name, _OWN_RECORD):
        fields = json.loads(path.read_bytes())
        shards, changed = (tuple(fields.pop(name)) for name in ("shards", "changed"))
        return TokenizedUnit(shards=shards, changed=changed, **fields)


def load_unit_index(directory: Path, number: int) -> np.ndarray:
    """INDEX_DTYPE [documents of the work unit]; `shard` counts from the work unit's first shard."""
    path = unit_directory(directory, number) / _INDEX_NAME
    with reading(path, path.name, _OWN_RECORD):
        return np.load(path, allow_pickle=False)


def scan_work_unit(job: ScanJob, advance: Advance) -> tuple[int, Scan]:
    """Read and hash the documents of a work unit and write its record; return the work unit's number and the record.

    Memory: one document, and 32 bytes for each document of the work unit.
    """
    found = _Found()
    lines = []
    skipped_ranges = []
    for number, file_range in enumerate(job.work_unit):
        if len(found.problems) >= MAX_LISTED_PROBLEMS:
            break
        file = job.reader.inputs[file_range.input].base / file_range.name
        try:
            lines.append(count_lines(file, file_range.begin, file_range.end) if file_range.is_cut else 0)
        except OSError:
            lines.append(0)  # reading it gives the problem
        own = _Found()
        whole = _scan_range(job, file_range, own, advance)
        if whole:
            found.add(own)
        else:
            # Nothing vouches for what came before the damage: a checksum stands at the end of what it covers.
            skipped_ranges.append(number)
            found.bad += 1
    path = _scan_path(job.directory, job.number)
    hashes = np.frombuffer(found.digests, np.uint8).reshape(-1, DIGEST_BYTES)
    write_array(path.with_suffix(".npy"), hashes.dtype, hashes.shape, [hashes])  # before the record that says so
    scan = Scan(
        documents=len(hashes),
        empty=found.empty,
        bad=found.bad,
        problems=tuple(found.problems[:MAX_LISTED_PROBLEMS]),
        lines=tuple(lines),
        left_out=dict(found.left_out),
        fields=dict(found.fields),
        skipped_ranges=tuple(skipped_ranges),
    )
    write_bytes(path, json.dumps(asdict(scan)).encode())
    return job.number, scan


@dataclass
class _Found:
    """What has been read of a file range or a work unit."""

    digests: bytearray = field(default_factory=bytearray)
    empty: int = 0
    bad: int = 0
    problems: list[Problem] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    fields: Counter[str] = field(default_factory=Counter)

    def add(self, other: "_Found") -> None:
        """Take in what has been read of another range."""
        self.digests += other.digests
        self.empty += other.empty
        self.bad += other.bad
        self.problems += other.problems
        self.left_out.update(other.left_out)
        self.fields.update(other.fields)


def _scan_range(job: ScanJob, file_range: FileRange, found: _Found, advance: Advance) -> bool:
    """Read and hash the documents of a file range; False if it cannot be read to its end and is skipped for that."""
    first_line = None if file_range.is_cut and file_range.begin else 0
    licence_key = job.reader.options.licence_key
    for document in job.reader.read(file_range, first_line, found.left_out):
        advance(1)
        if isinstance(document, BadText):
            found.bad += 1
            if document.is_file and job.skip_bad:
                return False
            if not job.skip_bad:
                found.problems.append(document.problem)
            if len(found.problems) >= MAX_LISTED_PROBLEMS:
                break
        elif document.text:
            found.digests += document.sha256
            found.fields.update([*document.fields, *([licence_key] if licence_key and document.licence else [])])
        else:
            found.empty += 1
    return True


def tokenize_work_unit(job: TokenizeJob, advance: Advance) -> tuple[int, TokenizedUnit]:
    """Write a work unit's shards, index and record; return the work unit's number and the record.

    Memory: one document and its tokens, 32 bytes for each document of the work unit, and about 2 kB for each document
    of a shard.

    Raises:
        InputError: a file is no longer what it was when it was scanned, a token id lies outside the vocabulary, or the
            tokenizer cannot write a text with ordinary tokens and bad ones are not skipped.
        OSError: the disk is full, for example; what was written is removed.
    """
    final = unit_directory(job.directory, job.number)
    # A process that was killed may have left its files.
    temporary = final.with_name(f"{final.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        tokenized = _write_unit(job, temporary, advance)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(final, ignore_errors=True)  # with other numbers of documents
    temporary.rename(final)
    return job.number, tokenized


def _write_unit(job: TokenizeJob, directory: Path, advance: Advance) -> TokenizedUnit:
    tokenizer = job.texts.load()
    licences: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    text_bytes = not_round_trip = 0
    changed: list[str] = []
    with (
        ShardWriter(directory, tokenizer, job.shard_bytes, job.first_document) as writer,
        SkippedList(directory) as skipped,
    ):
        for source_number, document in _documents_to_keep(job, skipped, advance):
            source = job.reader.inputs[source_number]
            licence = document.licence or source.licence
            meta: dict[str, object] = {
                "licence": licence,
                "path": document.path,
                "sha256": document.sha256.hex(),
                "source": source.source,
            }
            if document.fields:
                meta["fields"] = document.fields
            try:
                tokens, comes_back = _encode(tokenizer, document.text, source.base / document.path)
            except InputError as error:
                if not job.skip_bad:
                    raise
                skipped.add(source.source, document.path, NOT_WRITABLE, error.problems[0])
                continue
            writer.add(tokens, meta)
            if not comes_back:
                not_round_trip += 1
                changed += [document.path] * (len(changed) < _LISTED_CHANGED)
            licences[licence[:_COUNTED_CHARACTERS]] += 1
            sources[source.source] += 1
            text_bytes += document.num_bytes
        shards = writer.finish_shards()
    for entry in shards.entries:
        flush_to_disk(directory / entry["name"])
    write_array(directory / _INDEX_NAME, shards.index.dtype, shards.index.shape, [shards.index])
    counts = (text_bytes, dict(licences), dict(sources), dict(skipped.counts), not_round_trip, tuple(changed))
    tokenized = TokenizedUnit(job.first_document, tuple(shards.entries), shards.max_token_id, *counts)
    write_bytes(directory / _RECORD_NAME, json.dumps(asdict(tokenized)).encode())
    return tokenized


def _encode(tokenizer: Tokenizer, text: str, place: Path) -> tuple[list[int], bool]:
    """Token ids of a text, and whether they give it back exactly.

    Raises:
        InputError: with the text's place, see `Tokenizer.encode`.
    """
    try:
        tokens = tokenizer.encode(text)
    except InputError as error:
        raise InputError([problem.within(str(place)) for problem in error.problems]) from None
    return tokens, tokenizer.decode(tokens) == text


def lines_before(plan: Plan, scans: Sequence[Scan]) -> list[tuple[int, ...]]:
    """Lines before each file range in its file, for the file ranges of each work unit."""
    result = []
    name, count = (-1, ""), 0
    for work_unit, scan in zip(plan.work_units, scans, strict=True):
        firsts = []
        for file_range, lines in zip(work_unit, scan.lines, strict=True):
            if (file_range.input, file_range.name) != name:
                name, count = (file_range.input, file_range.name), 0
            firsts.append(count)
            count += lines
        result.append(tuple(firsts))
    return result


def _documents_to_keep(job: TokenizeJob, skipped: SkippedList, advance: Advance) -> Iterator[tuple[int, TextDocument]]:
    """Documents that stay, each with the number of its input; those that cannot be used are listed in `skipped`."""
    digests = load_digests(job.directory, job.number)
    number = 0
    for place, (file_range, first_line) in enumerate(zip(job.work_unit, job.first_lines, strict=True)):
        source = job.reader.inputs[file_range.input].source
        if place in job.skipped_ranges:
            damaged = _damage_of_file(job, file_range, first_line)
            skipped.add(source, damaged.path, damaged.reason, damaged.problem)
            continue
        for document in job.reader.read(file_range, first_line):
            if isinstance(document, BadText):
                if document.is_file:
                    raise InputError([document.problem])
                skipped.add(source, document.path, document.reason, document.problem)
                continue
            if not document.text:
                continue
            if number >= len(digests) or document.sha256 != digests[number].tobytes():
                raise _changed(job, file_range.input, document.path)
            if job.keep[number]:
                yield file_range.input, document
            number += 1
            advance(1)
    if number != len(digests):
        last = job.work_unit[-1]
        raise _changed(job, last.input, last.name)


def _damage_of_file(job: TokenizeJob, file_range: FileRange, first_line: int) -> BadText:
    """Why a file range could not be read to its end."""
    for document in job.reader.read(file_range, first_line):
        if isinstance(document, BadText) and document.is_file:
            return document
    raise _changed(job, file_range.input, file_range.name)


def _changed(job: TokenizeJob, source_number: int, path: str) -> Exception:
    where = job.reader.inputs[source_number].base / path
    return bad_input(str(where), "file", "other text than a moment ago", "inputs that do not change during the build")


@lru_cache(maxsize=1)
def _tokenizer_of_process(directory: Path) -> Tokenizer:
    return load_tokenizer(directory)


def _scan_path(directory: Path, number: int) -> Path:
    return directory / f"scan-{number:06d}.json"
