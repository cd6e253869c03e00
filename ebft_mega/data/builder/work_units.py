"""What a worker does with one work unit of a build: read and hash its documents, then tokenize those that stay.

The texts are read twice, since the number of a document in the dataset, and whether an equal one came before,
are known only when all have been read once. Reading costs little beside tokenizing.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ebft_mega.data.builder.deduplication import DIGEST_BYTES
from ebft_mega.data.builder.shard_writer import ShardWriter
from ebft_mega.data.builder.work_plan import FileRange, Plan, Reader
from ebft_mega.data.builder.worker_pool import Advance
from ebft_mega.data.text.text_files import BadText, TextDocument, count_lines
from ebft_mega.data.text.tokenizer import Tokenizer, load_tokenizer
from ebft_mega.errors import InputError, Problem
from ebft_mega.io.durable import flush_to_disk, write_bytes
from ebft_mega.io.input_errors import bad_input

# Of one work unit: a wrong --text-key makes every line of a dump a problem.
MAX_LISTED_PROBLEMS = 1000

# Names of a work unit's files say "part": builds that were stopped have them.
_RECORD_NAME = "part.json"
_INDEX_NAME = "index.npy"


@dataclass(frozen=True)
class Scan:
    """What the first reading of a work unit found."""

    documents: int  # with text that can be used
    empty: int
    bad: int
    problems: tuple[Problem, ...]  # the first of them
    lines: tuple[int, ...]  # of each file range that is cut, else 0


@dataclass(frozen=True)
class TokenizedUnit:
    """What the shards of a work unit hold."""

    shards: tuple[dict[str, Any], ...]  # `ShardEntry` fields
    max_token_id: int
    text_bytes: int
    licences: dict[str, int]  # documents of each
    sources: dict[str, int]
    bad: tuple[dict[str, str], ...]  # documents left out: source, path, key, found, expected


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
    keep: np.ndarray  # bool [Scan.documents]


def unit_directory(directory: Path, number: int) -> Path:
    """Directory of the shards of a tokenized work unit; it appears when they are complete."""
    return directory / f"part-{number:06d}"


def load_scan(directory: Path, number: int) -> Scan | None:
    """The record of a work unit that has been scanned, None if it has not."""
    path = _scan_path(directory, number)
    if not path.is_file():
        return None
    fields = json.loads(path.read_bytes())
    problems = tuple(Problem(**problem) for problem in fields.pop("problems"))
    return Scan(problems=problems, lines=tuple(fields.pop("lines")), **fields)


def load_digests(directory: Path, number: int) -> np.ndarray:
    """sha256 of the documents of a scanned work unit: uint8 [Scan.documents, 32], memory-mapped."""
    return np.load(_scan_path(directory, number).with_suffix(".npy"), mmap_mode="r", allow_pickle=False)


def load_tokenized(directory: Path, number: int) -> TokenizedUnit | None:
    """The record of a work unit that has been tokenized, None if it has not."""
    path = unit_directory(directory, number) / _RECORD_NAME
    if not path.is_file():
        return None
    fields = json.loads(path.read_bytes())
    return TokenizedUnit(shards=tuple(fields.pop("shards")), bad=tuple(fields.pop("bad")), **fields)


def load_unit_index(directory: Path, number: int) -> np.ndarray:
    """INDEX_DTYPE [documents of the work unit]; `shard` counts from the work unit's first shard."""
    return np.load(unit_directory(directory, number) / _INDEX_NAME, allow_pickle=False)


def scan_work_unit(job: ScanJob, advance: Advance) -> tuple[int, Scan]:
    """Read and hash the documents of a work unit and write its record; return the work unit's number and the record.

    Memory: one document, and 32 bytes for each document of the work unit.
    """
    digests = bytearray()
    empty = bad = 0
    problems: list[Problem] = []
    lines = []
    for file_range in job.work_unit:
        if len(problems) >= MAX_LISTED_PROBLEMS:
            break
        file = job.reader.inputs[file_range.input].base / file_range.name
        try:
            lines.append(count_lines(file, file_range.begin, file_range.end) if file_range.is_cut else 0)
        except OSError as error:
            problems.append(Problem(str(file), "file", str(error.strerror), "a readable file"))
            continue
        for document in job.reader.read(file_range, first_line=None if file_range.is_cut and file_range.begin else 0):
            advance(1)
            if isinstance(document, BadText):
                bad += 1
                # What cannot be read to its end may hold anything: it is never left out silently.
                if document.is_file or not job.skip_bad:
                    problems.append(document.problem)
            elif document.text:
                digests += document.sha256
            else:
                empty += 1
            if len(problems) >= MAX_LISTED_PROBLEMS:
                break
    path = _scan_path(job.directory, job.number)
    hashes = np.frombuffer(bytes(digests), np.uint8).reshape(-1, DIGEST_BYTES)
    np.save(path.with_suffix(".npy"), hashes, allow_pickle=False)
    flush_to_disk(path.with_suffix(".npy"))  # before the record that says that it is there
    scan = Scan(len(hashes), empty, bad, tuple(problems[:MAX_LISTED_PROBLEMS]), tuple(lines))
    write_bytes(path, json.dumps(asdict(scan)).encode())
    return job.number, scan


def tokenize_work_unit(job: TokenizeJob, advance: Advance) -> tuple[int, TokenizedUnit]:
    """Write a work unit's shards, index and record; return the work unit's number and the record.

    Memory: one document and its tokens, 32 bytes for each document of the work unit, and about 2 kB for each document
    of a shard.

    Raises:
        InputError: a file is no longer what it was when it was scanned, or a token id lies outside the vocabulary.
    """
    tokenizer = job.texts.load()
    final = unit_directory(job.directory, job.number)
    # A process that was killed may have left its files.
    temporary = final.with_name(f"{final.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    writer = ShardWriter(temporary, tokenizer, job.shard_bytes, job.first_document)
    licences: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    text_bytes = 0
    bad: list[dict[str, str]] = []
    try:
        for source_number, document in _documents_to_keep(job, bad, advance):
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
            writer.add(tokenizer.encode(document.text), meta)
            licences[licence] += 1
            sources[source.source] += 1
            text_bytes += document.num_bytes
        shards = writer.finish_shards()
    finally:
        writer.close()
    for entry in shards.entries:
        flush_to_disk(temporary / entry["name"])
    np.save(temporary / _INDEX_NAME, shards.index, allow_pickle=False)
    flush_to_disk(temporary / _INDEX_NAME)
    tokenized = TokenizedUnit(
        tuple(shards.entries), shards.max_token_id, text_bytes, dict(licences), dict(sources), tuple(bad)
    )
    write_bytes(temporary / _RECORD_NAME, json.dumps(asdict(tokenized)).encode())
    temporary.rename(final)
    return job.number, tokenized


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


def _documents_to_keep(
    job: TokenizeJob, bad: list[dict[str, str]], advance: Advance
) -> Iterator[tuple[int, TextDocument]]:
    """Documents that stay, each with the number of its input; those that cannot be used are appended to `bad`."""
    digests = load_digests(job.directory, job.number)
    number = 0
    for file_range, first_line in zip(job.work_unit, job.first_lines, strict=True):
        for document in job.reader.read(file_range, first_line):
            if isinstance(document, BadText):
                problem = document.problem
                if document.is_file:
                    raise InputError([problem])
                place = {"source": job.reader.inputs[file_range.input].source, "path": document.path}
                bad.append(place | {"key": problem.key, "found": problem.found, "expected": problem.expected})
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


def _changed(job: TokenizeJob, source_number: int, path: str) -> Exception:
    where = job.reader.inputs[source_number].base / path
    return bad_input(str(where), "file", "other text than a moment ago", "inputs that do not change during the build")


@lru_cache(maxsize=1)
def _tokenizer_of_process(directory: Path) -> Tokenizer:
    return load_tokenizer(directory)


def _scan_path(directory: Path, number: int) -> Path:
    return directory / f"scan-{number:06d}.json"
