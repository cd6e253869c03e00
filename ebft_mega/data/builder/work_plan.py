"""Which files a build reads, and how they are cut into work units, whatever the number of processes."""

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from ebft_mega.data.builder.build_options import BuildOptions
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
# thousand work units; in between there are enough of them for every core to stay busy to the end.
SMALLEST_WORK_UNIT_BYTES = 4 << 20
LARGEST_WORK_UNIT_BYTES = 1 << 30
USUAL_WORK_UNITS = 64

# Part of a plan's identity: another version must not resume an unfinished build of this one.
_BUILD_VERSION = 1


@dataclass(frozen=True)
class Input:
    """One `--input`: a directory of text files, or containers (JSONL files, text webdataset shards)."""

    base: Path  # what the paths of its files are relative to
    source: str  # name that is recorded with every document
    licence: str  # of documents that name none
    holds_texts: bool


class FileRange(NamedTuple):
    """A whole file, or a range of the lines of a plain JSONL file."""

    input: int  # position in `Reader.inputs`
    name: str  # relative to the input's base
    begin: int
    end: int  # bytes
    is_cut: bool  # a range of lines, not the whole file


@dataclass(frozen=True)
class Reader:
    """Read the documents of file ranges."""

    inputs: tuple[Input, ...]
    options: ReadOptions

    def read(self, file_range: FileRange, first_line: int | None) -> Iterator[TextDocument | BadText]:
        """Read the documents of a file range.

        Args:
            file_range: of a file of one of the inputs.
            first_line: lines of its file before it, see `read_jsonl`.
        """
        source = self.inputs[file_range.input]
        file = source.base / file_range.name
        if source.holds_texts:
            try:
                yield decode_text(file.read_bytes(), str(file), file_range.name)
            except OSError as error:
                problem = Problem(str(file), "text", str(error.strerror), "a readable file")
                yield BadText(problem, file_range.name, is_file=True)
        elif file_range.name.endswith(ARCHIVE_SUFFIX):
            yield from read_text_archive(file, file_range.name, self.options)
        else:
            end = file_range.end if file_range.is_cut else None
            yield from read_jsonl(file, file_range.name, self.options, file_range.begin, end, first_line)


@dataclass(frozen=True)
class Plan:
    """Inputs in the order in which they are read, cut into work units: what one process works on at a time."""

    reader: Reader
    work_units: tuple[tuple[FileRange, ...], ...]
    identity: str  # changes with every file's name, size and time of change, and with every option


class _ListedFile(NamedTuple):
    input: int
    name: str  # relative to the input's base
    size: int
    changed: int  # time of the last change of its contents, as tools such as rsync may set it, ns
    touched: int  # time of the last change of anything about it, which only the system sets, ns


def make_plan(sources: Sequence[Path], options: BuildOptions, tokenizer_sha256: str) -> Plan:
    """List the files of all inputs and cut them into work units.

    A work unit is some whole files in order, or a range of a plain JSONL file. A compressed file and an archive are
    never cut, so a work unit may be as large as they are.

    Memory: about 700 bytes per input file.

    Args:
        sources: directories, JSONL files or text webdataset shards; the order is kept.
        options: of the build.
        tokenizer_sha256: of the tokenizer; part of the plan's identity.

    Raises:
        InputError: with every source in which there is nothing to read.
    """
    inputs: list[Input] = []
    listed: list[_ListedFile] = []
    problems: list[Problem] = []
    for number, source in enumerate(sources):
        try:
            files, holds_texts = list_inputs(source, options.pattern)
        except InputError as error:
            problems += error.problems
            continue
        base = source if source.is_dir() else source.parent
        licence = options.licence or _corpus_licence(source)
        inputs.append(Input(base, base.absolute().name, licence, holds_texts))
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
    work_unit_bytes = options.work_unit_bytes
    if work_unit_bytes is None:
        total = sum(file.size for file in listed)
        work_unit_bytes = min(max(total // USUAL_WORK_UNITS, SMALLEST_WORK_UNIT_BYTES), LARGEST_WORK_UNIT_BYTES)
    work_units = tuple(_work_units(inputs, listed, work_unit_bytes))
    identity = _identity(inputs, listed, options, work_unit_bytes, tokenizer_sha256)
    return Plan(Reader(tuple(inputs), options.read), work_units, identity)


def _identity(
    inputs: list[Input],
    listed: list[_ListedFile],
    options: BuildOptions,
    work_unit_bytes: int,
    tokenizer_sha256: str,
) -> str:
    """Hash of everything that decides the bytes of the dataset."""
    others = {
        "version": _BUILD_VERSION,
        "tokenizer": tokenizer_sha256,
        "shard_bytes": options.shard_bytes,
        "deduplicate": options.deduplicate,
        "skip_bad": options.skip_bad,
    }
    parameters = [asdict(options.read), options.pattern, work_unit_bytes, others]
    identity = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode())
    for source in inputs:
        identity.update(json.dumps([source.source, source.licence, source.holds_texts]).encode())
    for file in listed:
        identity.update(json.dumps(file).encode())
    return identity.hexdigest()


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


def _work_units(
    inputs: list[Input], listed: list[_ListedFile], work_unit_bytes: int
) -> Iterator[tuple[FileRange, ...]]:
    work_unit: list[FileRange] = []
    filled = 0
    for file in listed:
        for file_range in _file_ranges(inputs[file.input], file, work_unit_bytes):
            work_unit.append(file_range)
            filled += file_range.end - file_range.begin
            if filled >= work_unit_bytes:
                yield tuple(work_unit)
                work_unit, filled = [], 0
    if work_unit:
        yield tuple(work_unit)


def _file_ranges(source: Input, file: _ListedFile, most_bytes: int) -> Iterator[FileRange]:
    if source.holds_texts or not file.name.endswith(PLAIN_JSONL_SUFFIX) or file.size <= most_bytes:
        yield FileRange(file.input, file.name, 0, file.size, is_cut=False)
        return
    for begin in range(0, file.size, most_bytes):
        yield FileRange(file.input, file.name, begin, min(begin + most_bytes, file.size), is_cut=True)


def _corpus_licence(source: Path) -> str:
    for directory in (source, source.absolute().parent):
        path = directory / CORPUS_MANIFEST_NAME
        if path.is_file():
            return str(read_json_object(path, "a corpus manifest").get("licence", UNKNOWN_LICENCE))
    return UNKNOWN_LICENCE
