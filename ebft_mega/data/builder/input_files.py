"""Which files an input holds, of which kind they are, and what of it is left out."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ebft_mega.data.builder.build_options import BuildOptions
from ebft_mega.data.selection.file_choice import nothing_stays
from ebft_mega.data.selection.folder_choice import FolderChoice
from ebft_mega.data.selection.split_names import count_splits
from ebft_mega.data.text.corpus import UNKNOWN_LICENCE
from ebft_mega.data.text.document_groups import nearest_group
from ebft_mega.data.text.file_kinds import JSON_LINES, TEKKEN, kind_of_file
from ebft_mega.data.text.listing import Listing, in_words, list_files, total_counts
from ebft_mega.data.text.source_archives import SOURCE, WEBDATASET, is_source_archive, kind_of_tar
from ebft_mega.data.text.text_files import (
    ARCHIVE_SUFFIX,
    CONTAINER_SUFFIXES,
    SOURCE_SUFFIXES,
    count_containers,
    first_record_keys,
)
from ebft_mega.errors import InputError, Problem
from ebft_mega.io.input_errors import bad_input

_KINDS = f"a {', '.join(CONTAINER_SUFFIXES[:-1])} or {ARCHIVE_SUFFIX} file"

OTHER_KINDS = "files of other kinds"
_SHOWN_NAMES = 3
# What describes a dataset of Hugging Face's hub, beside its files.
_DESCRIBING = re.compile(
    r"(README|LICEN[CS]E|NOTICE|COPYING|CITATION|CHANGELOG|dataset_infos?|state)([-_.](md|txt|rst|json|cff|bib))?", re.I
)


@dataclass(frozen=True)
class InputFiles:
    """What is read of one `--input`."""

    files: tuple[Path, ...]  # in the order in which they are read
    holds_texts: bool  # each file is a text; else JSON lines or an archive
    listing: Listing = field(default_factory=lambda: Listing(()))  # counts, and what could not be accessed
    others: tuple[str, ...] = ()  # first names of files of other kinds that are left out
    containers_as_texts: int = 0  # files that look like JSON lines or archives, and are read as texts
    source_archives: bool = False  # plain tar files among the containers are archives of source
    other_keys: tuple[str, ...] = ()  # of JSON lines that have not the wanted key, for messages
    matched: Mapping[str, int] = field(default_factory=dict)  # options with their patterns
    notes: tuple[str, ...] = ()  # about the choice of files


def list_inputs(path: Path, options: BuildOptions, output: Path | None = None, alone: bool = True) -> InputFiles:
    """List the files of one input.

    A folder whose files all are containers by their names (JSON lines, Parquet, archives) or describe them (README.md,
    dataset_infos.json, ...), and a folder in which the options look for records, is read as containers; any other one
    as texts.

    Args:
        path: a container, or a folder.
        options: pattern and keys.
        output: left out where it lies below the folder.
        alone: whether it is the only input. Else the keys may be meant for another one, so a folder that holds fewer
            containers than other files is refused.

    Raises:
        InputError: there is nothing to read, or it cannot be said as what.
    """
    if path.is_file():
        return _one_file(path, options)
    if not path.is_dir():
        found = "neither a file nor a directory" if path.exists() else "no such file or directory"
        raise bad_input("--input", str(path), found, f"a directory, or {_KINDS}")
    choice = FolderChoice(path, options.files, options.gitignore)
    listing = list_files(path, choice, output)
    listing = replace(listing, left_out=total_counts([listing.left_out, choice.left_out]))
    if choice.problems:
        raise InputError(choice.problems)
    if not listing.files and not listing.unreadable:
        raise bad_input("--input", str(path), _nothing(listing, options), "text, JSONL, Parquet or tar files")
    files = _containers(path, listing, options, alone) or _texts(listing)
    return replace(
        files, matched=choice.matched, notes=tuple(f"{path.absolute().name}: {note}" for note in choice.notes())
    )


def _nothing(listing: Listing, options: BuildOptions) -> str:
    """What is found where no file is left."""
    counts = f" (left out: {in_words(listing.left_out)})" if listing.left_out else ""
    return f"{nothing_stays(options.files, options.gitignore)}{counts}"


def option_problems(
    inputs: Sequence[InputFiles], folders: int, licences: Sequence[str], options: BuildOptions
) -> Iterator[Problem]:
    """Report options that can have no effect on these inputs.

    Args:
        inputs: all of them.
        folders: how many of them are folders.
        licences: of each, for documents that name none.
        options: as given.
    """
    containers = [file for each in inputs if not each.holds_texts for file in each.files]
    archives = [file for file in containers if file.name.endswith(ARCHIVE_SUFFIX)]
    keys = sorted({key for each in inputs for key in each.other_keys})
    found = f"JSON lines with the keys {', '.join(keys)}" if keys else "no JSON lines in any --input"
    packed = [file for file in containers if is_source_archive(file.name)]
    if options.text_key is not None and len(containers) == len(archives) + len(packed):
        expected = "JSON lines with this key, or no --text-key"
        yield Problem("--text-key", options.text_key, found, expected)
    if options.text_member is not None and not archives:
        expected = "webdataset shards with such members, or no --text-member"
        yield Problem("--text-member", options.text_member, f"no {ARCHIVE_SUFFIX} file in any --input", expected)
    if options.archives is not None and not (archives if options.archives == WEBDATASET else archives or packed):
        expected = f"{ARCHIVE_SUFFIX} files, or no --archives"
        yield Problem("--archives", options.archives, "no such archive in any --input", expected)
    has_records = [
        not is_source_archive(file.name) and not (each.source_archives and file.name.endswith(ARCHIVE_SUFFIX))
        for each in inputs
        if not each.holds_texts
        for file in each.files
    ]
    for option, given in (("--licence-key", options.licence_key), ("--keep-key", ", ".join(options.keep_keys))):
        if given and not any(has_records):
            expected = f"JSON lines, Parquet or webdataset shards, or no {option}"
            yield Problem(option, given, "inputs of which each file is a text", expected)
    if options.split and options.split.key and not containers:
        expected = "top-folder, repo or document, or JSON lines, Parquet or webdataset shards"
        near = nearest_group(options.split.key)
        yield Problem("--split-by", options.split.key, "inputs of which each file is a text", expected, near)
    for option, given in (
        ("--pattern", options.pattern if options.pattern != BuildOptions.pattern else ""),
        ("--include", ", ".join(options.include)),
        ("--exclude", ", ".join(options.exclude)),
        ("--gitignore", "yes" if options.gitignore else ""),
    ):
        of_members = option != "--gitignore" and not all(has_records)  # of archives of source that are inputs
        if given and not folders and not of_members:
            yield Problem(option, given, "no directory among the inputs", f"a directory, or no {option}")
    yield from _licence_problems(licences, options)
    for key, count in Counter(options.keep_keys).items():
        if count > 1:
            yield Problem("--keep-key", key, f"{count} times", "each key once")


def _licence_problems(licences: Sequence[str], options: BuildOptions) -> Iterator[Problem]:
    """Report a choice of licences where none is known.

    Args:
        licences: of each input, for documents that name none.
        options: as given.
    """
    for option, given in (("--keep-licence", options.keep_licences), ("--drop-licence", options.drop_licences)):
        if given and options.licence_key is None and set(licences) == {UNKNOWN_LICENCE}:
            expected = f"--licence-key, or --licence for all documents, or no {option}"
            yield Problem(option, ", ".join(given), "documents of which no licence is known", expected)


def repeated_input_problems(sources: Sequence[Path]) -> Iterator[Problem]:
    """Report inputs that are given twice, or lie in another one: their documents would be read twice."""
    places = [source.resolve() for source in sources]
    for number, place in enumerate(places):
        for other, other_place in enumerate(places):
            if other != number and (place.is_relative_to(other_place)) and (place != other_place or other < number):
                found = f"the same as {sources[other]}" if place == other_place else f"a part of {sources[other]}"
                yield Problem("--input", str(sources[number]), found, "each file in one input")
                break


def _one_file(path: Path, options: BuildOptions) -> InputFiles:
    if path.name.endswith(CONTAINER_SUFFIXES):
        return InputFiles((path,), holds_texts=False, source_archives=_hold_source([path], options))
    keys = _keys_of(path, options)
    kind = kind_of_file(path)
    if kind is not None and kind is not JSON_LINES and (keys is None or kind is TEKKEN):
        raise bad_input("--input", str(path), kind.words, kind.advice)
    if keys is None:
        raise bad_input("--input", str(path), "a file that holds no JSON lines", f"a directory, or {_KINDS}")
    if not options.wants_records:
        expected = f"--text-key, with which it is read as such, or a directory, or {_KINDS}"
        raise bad_input("--input", str(path), f"JSON lines with the keys {', '.join(keys)}", expected)
    if options.read.text_key not in keys:
        found, expected = f"JSON lines with the keys {', '.join(keys)}", f"the key {options.read.text_key!r}"
        raise bad_input("--input", str(path), found, expected)
    return InputFiles((path,), holds_texts=False)


def _keys_of(path: Path, options: BuildOptions) -> list[str] | None:
    try:
        return first_record_keys(path, options.encoding_fallback)
    except OSError as error:
        raise bad_input(str(path), "--input", str(error.strerror), "a file that can be read") from error


def _containers(path: Path, listing: Listing, options: BuildOptions, alone: bool) -> InputFiles | None:
    """The folder as containers; None where it is to be read as texts."""
    chosen: list[Path] = []
    others: list[Path] = []
    unreadable = list(listing.unreadable)
    other_keys: set[str] = set()
    for file in listing.files:
        if file.name.endswith(CONTAINER_SUFFIXES):
            # Beside records, archives of source are other files.
            is_other = options.wants_records and is_source_archive(file.name) and options.archives != SOURCE
            (others if is_other else chosen).append(file)
            continue
        try:
            keys = _keys_of(file, options) if options.wants_records else None
        except InputError as error:
            unreadable += error.problems
            continue
        (chosen if options.read.text_key in (keys or ()) else others).append(file)
        other_keys |= set(keys or ())
    wanted = (
        options.wants_records
        or options.archives is not None
        and any(file.name.endswith((*SOURCE_SUFFIXES, ARCHIVE_SUFFIX)) for file in chosen)
    ) or (options.text_member is not None and any(file.name.endswith(ARCHIVE_SUFFIX) for file in chosen))
    describing = all(_DESCRIBING.fullmatch(file.name) for file in others)
    if not chosen or (others and not wanted and not describing):
        texts = _texts(listing)
        return replace(texts, other_keys=tuple(sorted(other_keys))) if other_keys else None
    if len(others) > len(chosen) and not alone:
        found = f"{len(chosen)} files of JSON lines or archives among {len(others)} others"
        expected = "a folder of one kind beside other inputs: name its files, or build it by itself"
        raise bad_input("--input", str(path), found, expected)
    _require_one_split(path, chosen)
    left_out = dict(listing.left_out) | ({OTHER_KINDS: len(others)} if others else {})
    shown = [file.relative_to(path).as_posix() for file in others[:_SHOWN_NAMES]]
    counted = Listing(tuple(chosen), left_out, listing.followed, tuple(unreadable))
    source_archives = _hold_source(chosen, options)
    return InputFiles(tuple(chosen), False, counted, tuple(shown), source_archives=source_archives)


def _hold_source(files: Sequence[Path], options: BuildOptions) -> bool:
    """Whether the plain tar files among some containers are archives of source.

    Raises:
        InputError: one of them is not clearly what the first one is, and no option says it.
    """
    if options.archives is not None:
        return options.archives == SOURCE
    archives = [file for file in files if file.name.endswith(ARCHIVE_SUFFIX)]
    if options.text_member is not None or not archives:
        return False
    first, _ = kind_of_tar(archives[0], options.read.text_member)
    problems = []
    for file in archives:
        kind, words = kind_of_tar(file, options.read.text_member)
        if kind is None or kind != first:
            expected = "--archives source (each member is a text) or --archives webdataset (samples with a text each)"
            problems.append(Problem(str(file), "--input", f"a tar file of {words}", expected))
    if problems:
        raise InputError(problems)
    return first == SOURCE


def _require_one_split(path: Path, files: Sequence[Path]) -> None:
    """Refuse a folder whose files are those of several splits.

    Raises:
        InputError: they are.
    """
    splits = count_splits(file.relative_to(path).as_posix() for file in files)
    if len(splits) > 1:
        found = f"files of several splits: {in_words(splits)}"
        expected = "one split at a time: --pattern for the names of its files, or its folder or files as --input"
        raise bad_input("--input", str(path), found, expected)


def _texts(listing: Listing) -> InputFiles:
    return InputFiles(
        listing.files, holds_texts=True, listing=listing, containers_as_texts=count_containers(listing.files)
    )
