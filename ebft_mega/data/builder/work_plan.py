"""Which files a build reads, and how they are cut into work units, whatever the number of processes."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ebft_mega.data.builder.build_options import BuildOptions
from ebft_mega.data.builder.input_files import (
    InputFiles,
    list_inputs,
    option_problems,
    repeated_input_problems,
)
from ebft_mega.data.selection.document_reader import FileRange, Input, Reader
from ebft_mega.data.selection.file_choice import FileChoice
from ebft_mega.data.selection.format_layouts import file_layouts, may_be_cut
from ebft_mega.data.selection.text_formats import Recogniser
from ebft_mega.data.text.corpus import corpus_licence
from ebft_mega.data.text.listing import OTHER_KINDS, OUTSIDE_LINKS, TO_FOLLOW, in_words, total_counts
from ebft_mega.errors import InputError, Problem
from ebft_mega.extension.text_format import Layout
from ebft_mega.io.input_errors import bad_input
from ebft_mega.io.parse_boundary import words_of

# A build of a few megabytes is spread over the cores of a small machine, one of terabytes stays at some
# thousand work units; in between there are enough of them for every core to stay busy to the end.
SMALLEST_WORK_UNIT_BYTES = 4 << 20
LARGEST_WORK_UNIT_BYTES = 1 << 30
USUAL_WORK_UNITS = 64

# Part of a plan's identity, and of the names of datasets made on demand: another version must not resume an unfinished
# build of this one, nor find its results.
BUILD_VERSION = 4


_WHOLE = Layout()


@dataclass(frozen=True)
class Plan:
    """Inputs in the order in which they are read, cut into work units: what one process works on at a time."""

    reader: Reader
    work_units: tuple[tuple[FileRange, ...], ...]
    identity: str  # changes with every file's name, size and time of change, and with every option
    left_out: Mapping[str, int]  # files and folders, by reason
    followed: Mapping[str, int]  # links, by kind
    unreadable: tuple[tuple[str, Problem], ...]  # with the name of their input; empty unless bad ones are skipped
    notes: tuple[str, ...]  # what a person should know, one sentence each, without a path of the machine
    matched: Mapping[str, int]  # options with patterns, and how many files and folders each matches
    formats: dict[str, Any]  # `BuildOptions.of_formats`


class _ListedFile(NamedTuple):
    input: int
    name: str  # relative to the input's base
    size: int
    changed: int  # time of the last change of its contents, as tools such as rsync may set it, ns
    touched: int  # time of the last change of anything about it, which only the system sets, ns
    format: str  # name of the entry that reads it


def make_plan(
    sources: Sequence[Path], options: BuildOptions, tokenizer_identity: str, output: Path | None = None
) -> Plan:
    """List the files of all inputs and cut them into work units.

    A work unit is some whole files in order, a range of a plain JSONL file, or row groups of Parquet files, as their
    formats divide them. A compressed file, an archive and a row group are never cut, so a work unit may be as large as
    they are.

    Memory: about 700 bytes per input file.

    Args:
        sources: directories and files; the order is kept.
        options: of the build.
        tokenizer_identity: `Tokenizer.identity`; part of the plan's identity.
        output: what an earlier build made, left out where it lies in one of the sources.

    Raises:
        InputError: with every source in which there is nothing to read, everything that cannot be accessed unless bad
            input is skipped, inputs that are given twice, and options that can have no effect; or a package is missing.
    """
    opened, licences = _opened(sources, options, output)
    found = [files for _, files in opened]
    inputs: list[Input] = []
    listed: list[_ListedFile] = []
    for number, ((source, files), licence) in enumerate(zip(opened, licences, strict=True)):
        base = source if source.is_dir() else source.parent
        inputs.append(_input(source, base, licence, files, options))
        pairs = zip(files.files, files.formats, strict=True)
        listed += [_listed_file(number, file, base, name) for file, name in pairs]
    containers = [file for file in listed if not inputs[file.input].holds_texts]
    places = [(inputs[file.input].base / file.name, file.format) for file in containers]
    layouts = dict(zip(containers, file_layouts(places, options.formats, options.read), strict=True))
    work_unit_bytes = options.work_unit_bytes
    if work_unit_bytes is None:
        total = sum(_num_bytes(file, layouts.get(file)) for file in listed)
        work_unit_bytes = min(max(total // USUAL_WORK_UNITS, SMALLEST_WORK_UNIT_BYTES), LARGEST_WORK_UNIT_BYTES)
    described = list(zip(inputs, found, strict=True))
    return Plan(
        Reader(tuple(inputs), options.read, options.limits, options.licences, options.formats),
        tuple(_work_units(listed, layouts, work_unit_bytes, options)),
        _identity(inputs, listed, options, work_unit_bytes, tokenizer_identity),
        left_out=total_counts(files.listing.left_out for files in found),
        followed=total_counts(files.listing.followed for files in found),
        unreadable=tuple((source.source, each) for source, files in described for each in files.listing.unreadable),
        notes=tuple(note for source, files in described for note in _notes(source.source, files)),
        matched=total_counts(files.matched for files in found),
        formats=options.of_formats,
    )


def _opened(
    sources: Sequence[Path], options: BuildOptions, output: Path | None
) -> tuple[list[tuple[Path, InputFiles]], list[str]]:
    """List the files of all sources; the licence of each source for documents that name none comes with it.

    Raises:
        InputError: see `make_plan`.
    """
    recogniser = Recogniser(options.formats, options.read)
    problems = list(repeated_input_problems(sources))
    opened: list[tuple[Path, InputFiles]] = []
    for source in sources:
        try:
            opened.append((source, list_inputs(source, options, output, len(sources) == 1, recogniser)))
        except InputError as error:
            problems += error.problems
    found = [files for _, files in opened]
    licences = [options.licence or corpus_licence(source) for source, _ in opened]
    if len(opened) == len(sources):
        folders = sum(source.is_dir() for source in sources)
        problems += option_problems(found, folders, licences, options, recogniser)
    if not options.skip_bad:
        problems += [problem for files in found for problem in files.listing.unreadable]
    if problems:
        raise InputError(problems)
    return opened, licences


def _input(source: Path, base: Path, licence: str, files: InputFiles, options: BuildOptions) -> Input:
    # What is chosen of a folder are its files; of an archive that is an input itself, its members.
    members = FileChoice() if source.is_dir() else options.files
    return Input(base, base.absolute().name, licence, files.holds_texts, members)


def _listed_file(number: int, file: Path, base: Path, format_name: str) -> _ListedFile:
    try:
        status = file.stat()
    except OSError as error:  # it has just gone
        raise bad_input("--input", str(file), words_of(error), "inputs that do not change during the build") from error
    name = file.relative_to(base).as_posix()
    return _ListedFile(number, name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, format_name)


def _notes(source: str, files: InputFiles) -> Iterator[str]:
    """Lines about one input: what is left out and what is followed."""
    left_out, followed = in_words(files.listing.left_out), in_words(files.listing.followed)
    if left_out:
        total = files.listing.left_out.get(OTHER_KINDS, 0)
        names = [*files.others, *["..."] * (total > len(files.others))]
        yield f"{source}: left out: {left_out}" + (f" ({', '.join(names)})" if names else "")
    if OUTSIDE_LINKS in files.listing.left_out:
        yield f"{source}: {TO_FOLLOW}"
    if followed:
        yield f"{source}: followed: {followed}"
    yield from files.notes
    if files.containers_as_texts:
        yield (
            f"{source}: JSONL or tar files among {len(files.files)} files that are read as one text each: "
            f"{files.containers_as_texts} (--text-key reads JSON lines, --pattern chooses)"
        )
    if files.listing.unreadable:
        yield f"{source}: files and folders that cannot be accessed and are skipped: {len(files.listing.unreadable)}"


def _identity(
    inputs: list[Input],
    listed: list[_ListedFile],
    options: BuildOptions,
    work_unit_bytes: int,
    tokenizer_identity: str,
) -> str:
    """Hash of everything that decides the bytes of the dataset."""
    others = {
        "version": BUILD_VERSION,
        "tokenizer": tokenizer_identity,
        "shard_bytes": options.shard_bytes,
        "deduplicate": options.deduplicate,
        "skip_bad": options.skip_bad,
    }
    if options.near_deduplicate is not None:
        others["near_deduplicate"] = options.near_deduplicate
    if options.licence_key is not None and options.licences.given():
        others["licences_by"] = options.licence_key  # scans count who names one
    if options.archives is not None:
        others["archives"] = options.archives
    if options.split:
        others["split"] = asdict(options.split)
    others |= options.of_formats
    chosen = [asdict(each) for each in (options.files, options.limits, options.licences)]
    parameters = [asdict(options.read), chosen, options.gitignore, work_unit_bytes, others]
    identity = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode())
    for source in inputs:
        identity.update(json.dumps([source.source, source.licence, source.holds_texts]).encode())
    for file in listed:
        identity.update(json.dumps(file).encode())
    return identity.hexdigest()


def _num_bytes(file: _ListedFile, layout: Layout | None) -> int:
    """Bytes of text of a file, about."""
    return file.size if layout is None or layout.sections is None else sum(layout.sections)


def _work_units(
    listed: list[_ListedFile],
    layouts: Mapping[_ListedFile, Layout | None],
    work_unit_bytes: int,
    options: BuildOptions,
) -> Iterator[tuple[FileRange, ...]]:
    """Cut all files into work units.

    Args:
        listed: all files.
        layouts: of those that are no texts; None for damaged ones.
        work_unit_bytes: a work unit has at least so many.
        options: of the build.
    """
    work_unit: list[FileRange] = []
    filled = 0
    for file in listed:
        layout = layouts.get(file, _WHOLE)
        for file_range, num_bytes in _file_ranges(file, layout, work_unit_bytes, options):
            work_unit.append(file_range)
            filled += num_bytes
            if filled >= work_unit_bytes:
                yield tuple(work_unit)
                work_unit, filled = [], 0
    if work_unit:
        yield tuple(work_unit)


def _file_ranges(
    file: _ListedFile, layout: Layout | None, most_bytes: int, options: BuildOptions
) -> Iterator[tuple[FileRange, int]]:
    """The ranges of a file, each with the bytes of text that it holds about."""
    if layout is None or layout.sections is not None:
        sections = () if layout is None or layout.sections is None else layout.sections
        for number, num_bytes in enumerate(sections):
            yield FileRange(file.input, file.name, number, number + 1, False, file.format), num_bytes
        if not sections:  # reading it says what is wrong, if anything is
            yield FileRange(file.input, file.name, 0, 0, False, file.format), 0
        return
    if file.size <= most_bytes or not may_be_cut(options.formats, file.format, file.name):
        yield FileRange(file.input, file.name, 0, file.size, False, file.format), file.size
        return
    for begin in range(0, file.size, most_bytes):
        end = min(begin + most_bytes, file.size)
        yield FileRange(file.input, file.name, begin, end, True, file.format), end - begin
