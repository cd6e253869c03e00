"""Which inputs a build reads, cut into parts that do not depend on who works on them."""

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from ebft_mega.data.text.archives import read_text_archive
from ebft_mega.data.text.corpus import CORPUS_MANIFEST_NAME
from ebft_mega.data.text.text_files import (
    BadText,
    ReadOptions,
    TextDocument,
    decode_text,
    list_text_files,
    read_jsonl,
)
from ebft_mega.errors import InputError, Problem
from ebft_mega.io.input_errors import bad_input, read_json_object

PLAIN_JSONL_SUFFIX = ".jsonl"
JSONL_SUFFIXES = (PLAIN_JSONL_SUFFIX, ".jsonl.gz", ".jsonl.zst", ".json.gz")
ARCHIVE_SUFFIX = ".tar"
CONTAINER_SUFFIXES = (*JSONL_SUFFIXES, ARCHIVE_SUFFIX)
UNKNOWN_LICENCE = "unknown"

# A build of a few megabytes is spread over the cores of a small machine, one of terabytes stays at some
# thousand parts; in between there are enough parts for every core to stay busy to the end.
SMALLEST_PART_BYTES = 4 << 20
LARGEST_PART_BYTES = 1 << 30
USUAL_PARTS = 64


@dataclass(frozen=True)
class Input:
    """One `--input`: a directory of text files, or containers (JSONL files, text webdataset shards)."""

    base: Path  # what the paths of its files are relative to
    source: str  # name that is recorded with every document
    licence: str  # of documents that name none
    holds_texts: bool


class Unit(NamedTuple):
    """A file, or a range of the lines of a plain JSONL file."""

    input: int
    name: str  # relative to the input's base
    begin: int
    end: int  # bytes
    is_range: bool


@dataclass(frozen=True)
class Reader:
    """Reads the documents of units."""

    inputs: tuple[Input, ...]
    options: ReadOptions

    def read_unit(self, unit: Unit, first_line: int | None) -> Iterator[TextDocument | BadText]:
        """Reads the documents of a unit.

        Args:
            unit: of one of the inputs.
            first_line: lines of its file before it, see `read_jsonl`.
        """
        source = self.inputs[unit.input]
        file = source.base / unit.name
        if source.holds_texts:
            try:
                yield decode_text(file.read_bytes(), str(file), unit.name)
            except OSError as error:
                problem = Problem(str(file), "text", str(error.strerror), "a readable file")
                yield BadText(problem, unit.name, is_file=True)
        elif unit.name.endswith(ARCHIVE_SUFFIX):
            yield from read_text_archive(file, unit.name, self.options)
        else:
            end = unit.end if unit.is_range else None
            yield from read_jsonl(file, unit.name, self.options, unit.begin, end, first_line)


@dataclass(frozen=True)
class Plan:
    """Inputs in the order in which they are read; a part is what one process works on at a time."""

    reader: Reader
    parts: tuple[tuple[Unit, ...], ...]
    identity: str  # changes with every file's name, size and time of change, and with every option


class _ListedFile(NamedTuple):
    input: int
    name: str  # relative to the input's base
    size: int
    changed: int  # time of the last change of its contents, as tools such as rsync may set it, ns
    touched: int  # time of the last change of anything about it, which only the system sets, ns


def make_plan(
    sources: Sequence[Path],
    pattern: str,
    licence: str | None,
    read: ReadOptions,
    part_bytes: int | None,
    options: dict[str, object],
) -> Plan:
    """Lists the files of all inputs and cuts them into parts.

    A part is a run of whole files, or a range of a plain JSONL file. A compressed file and an archive are never
    cut, so a part may be as large as they are. Takes about 700 bytes of memory per input file.

    Args:
        sources: directories, JSONL files or text webdataset shards; the order is kept.
        pattern: shell pattern on the file names of directories.
        licence: of documents that name none; None takes it from the corpus manifest of
            `tools/build_corpus.py` in or above each source.
        read: what is taken from a document's record.
        part_bytes: size of a part; None takes 1/64 of all inputs, at least 4 MiB and at most 1 GiB.
        options: everything else that decides the bytes of the dataset; part of the identity.

    Raises:
        InputError: with every source in which there is nothing to read.
    """
    inputs: list[Input] = []
    listed: list[_ListedFile] = []
    problems: list[Problem] = []
    for number, source in enumerate(sources):
        try:
            files, holds_texts = list_inputs(source, pattern)
        except InputError as error:
            problems += error.problems
            continue
        base = source if source.is_dir() else source.parent
        inputs.append(Input(base, base.absolute().name, licence or _corpus_licence(source), holds_texts))
        for file in files:
            status = file.stat()
            name = file.relative_to(base).as_posix()
            listed.append(_ListedFile(number, name, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
        if holds_texts and (others := sum(file.name.endswith(CONTAINER_SUFFIXES) for file in files)):
            print(
                f"note: {source} holds {others} JSONL or tar files among {len(files)}: each file is read as one text "
                "(--pattern chooses)",
                file=sys.stderr,
            )
    if problems:
        raise InputError(problems)
    if part_bytes is None:
        total = sum(file.size for file in listed)
        part_bytes = min(max(total // USUAL_PARTS, SMALLEST_PART_BYTES), LARGEST_PART_BYTES)
    identity = hashlib.sha256(json.dumps([asdict(read), pattern, part_bytes, options], sort_keys=True).encode())
    for source_input in inputs:
        identity.update(json.dumps([source_input.source, source_input.licence, source_input.holds_texts]).encode())
    for listed_file in listed:
        identity.update(json.dumps(listed_file).encode())
    parts = tuple(_parts(inputs, listed, part_bytes))
    return Plan(Reader(tuple(inputs), read), parts, identity.hexdigest())


def list_inputs(path: Path, pattern: str = "*") -> tuple[list[Path], bool]:
    """Input files in the order in which they are read.

    Args:
        path: a JSONL file or a tar file, a directory that holds nothing else, or a directory of text files.
        pattern: shell pattern on the file names of a directory.

    Returns:
        The files, and whether each of them is a text (else JSON lines or an archive).

    Raises:
        InputError: there is nothing to read.
    """
    kinds = f"a {', '.join(CONTAINER_SUFFIXES[:-1])} or {ARCHIVE_SUFFIX} file"
    if path.is_file():
        if path.name.endswith(CONTAINER_SUFFIXES):
            return [path], False
        raise bad_input("--input", str(path), "a file", f"a directory, or {kinds}")
    if not path.is_dir():
        raise bad_input("--input", str(path), "no such file or directory", f"a directory, or {kinds}")
    files = list_text_files(path, pattern)
    if not files:
        raise bad_input("--input", str(path), f"no file that matches {pattern!r}", "text, JSONL or tar files")
    return files, not all(file.name.endswith(CONTAINER_SUFFIXES) for file in files)


def _parts(inputs: list[Input], listed: list[_ListedFile], part_bytes: int) -> Iterator[tuple[Unit, ...]]:
    part: list[Unit] = []
    filled = 0
    for file in listed:
        for unit in _units(inputs[file.input], file.input, file.name, file.size, part_bytes):
            part.append(unit)
            filled += unit.end - unit.begin
            if filled >= part_bytes:
                yield tuple(part)
                part, filled = [], 0
    if part:
        yield tuple(part)


def _units(source: Input, number: int, name: str, size: int, part_bytes: int) -> Iterator[Unit]:
    if source.holds_texts or not name.endswith(PLAIN_JSONL_SUFFIX) or size <= part_bytes:
        yield Unit(number, name, 0, size, is_range=False)
        return
    for begin in range(0, size, part_bytes):
        yield Unit(number, name, begin, min(begin + part_bytes, size), is_range=True)


def _corpus_licence(source: Path) -> str:
    for directory in (source, source.absolute().parent):
        path = directory / CORPUS_MANIFEST_NAME
        if path.is_file():
            return str(read_json_object(path, "a corpus manifest").get("licence", UNKNOWN_LICENCE))
    return UNKNOWN_LICENCE
