"""The second reading of a work unit: tokenize the documents that stay, and write their shards.

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

import numpy as np

from ebft_mega.data.builder.array_files import write_array
from ebft_mega.data.builder.shard_writer import ShardWriter
from ebft_mega.data.builder.skipped_list import SkippedList
from ebft_mega.data.builder.unit_files import INDEX_NAME, RECORD_NAME, Scan, TokenizedUnit, load_digests, unit_directory
from ebft_mega.data.builder.work_plan import Plan
from ebft_mega.data.builder.worker_pool import Advance
from ebft_mega.data.selection.document_reader import FileRange, Reader
from ebft_mega.data.text.text_files import BadText, TextDocument
from ebft_mega.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from ebft_mega.errors import InputError
from ebft_mega.io.durable import flush_to_disk, write_bytes
from ebft_mega.io.input_errors import bad_input

NOT_WRITABLE = "a text that the tokenizer cannot write"  # why a document is left out with `--skip-bad`
_COUNTED_CHARACTERS = 1000  # of a licence's name, which is whatever a document says
_LISTED_CHANGED = 3  # of the documents that do not round-trip, of one work unit


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer, or where a worker process finds it."""

    tokenizer: Tokenizer | None
    directory: Path
    eos_id: int
    add_bos: bool

    @classmethod
    def of(cls, tokenizer: Tokenizer, is_shared: bool) -> "TextEncoder":
        """A tokenizer for this process, or one that others load."""
        directory = tokenizer.files[0].parent
        return cls(None if is_shared else tokenizer, directory, tokenizer.eos_id, tokenizer.bos_id is not None)

    def load(self) -> Tokenizer:
        """The tokenizer; a process loads it once."""
        return self.tokenizer or _tokenizer_of_process(self.directory, self.eos_id, self.add_bos)


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
    scans: Path  # directory of the scan; `directory` is another one where two datasets are made of one scan
    lists_bad: bool = True  # documents that cannot be used; of two datasets the first lists them


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
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    licences: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    encodings: Counter[str] = Counter()
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
            if document.encoding:
                meta["encoding"] = document.encoding
            try:
                tokens, comes_back = _encode(tokenizer, document.text, source.base / document.path)
            except InputError as error:
                if not job.skip_bad:
                    raise
                skipped.add(source.source, document.path, NOT_WRITABLE, error.problems[0])
                continue
            writer.add([*begin, *tokens] if begin else tokens, meta)
            if not comes_back:
                not_round_trip += 1
                changed += [document.path] * (len(changed) < _LISTED_CHANGED)
            licences[licence[:_COUNTED_CHARACTERS]] += 1
            sources[source.source] += 1
            encodings.update([document.encoding] if document.encoding else [])
            text_bytes += document.num_bytes
        shards = writer.finish_shards()
    for entry in shards.entries:
        flush_to_disk(directory / entry["name"])
    write_array(directory / INDEX_NAME, shards.index.dtype, shards.index.shape, [shards.index])
    counts = (
        text_bytes,
        dict(licences),
        dict(sources),
        dict(encodings),
        dict(skipped.counts),
        not_round_trip,
        tuple(changed),
    )
    tokenized = TokenizedUnit(job.first_document, tuple(shards.entries), shards.max_token_id, *counts)
    write_bytes(directory / RECORD_NAME, json.dumps(asdict(tokenized)).encode())
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
    return tokens, tokenizer.gives_back(tokens, text)


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
    if not job.lists_bad and not job.keep.any():
        return
    digests = load_digests(job.scans, job.number)
    number = 0
    for place, (file_range, first_line) in enumerate(zip(job.work_unit, job.first_lines, strict=True)):
        source = job.reader.inputs[file_range.input].source
        if place in job.skipped_ranges:
            if not job.lists_bad:
                continue
            damaged = _damage_of_file(job, file_range, first_line)
            skipped.add(source, damaged.path, damaged.reason, damaged.problem)
            continue
        for document in job.reader.read(file_range, first_line):
            if isinstance(document, BadText):
                if document.is_file:
                    raise InputError([document.problem])
                if job.lists_bad:
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
def _tokenizer_of_process(directory: Path, eos_id: int, add_bos: bool) -> Tokenizer:
    return load_tokenizer(directory, str(eos_id), add_bos)
