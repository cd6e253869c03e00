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
from ebft_mega.data.selection.text_formats import Recogniser, kind_of_file
from ebft_mega.data.text.corpus import UNKNOWN_LICENCE
from ebft_mega.data.text.document_groups import nearest_group
from ebft_mega.data.text.file_kinds import TEKKEN
from ebft_mega.data.text.listing import OTHER_KINDS, Listing, in_words, list_files, total_counts
from ebft_mega.errors import InputError, Problem
from ebft_mega.io.input_errors import bad_input

_SHOWN_NAMES = 3
# What describes a dataset of Hugging Face's hub, beside its files.
_DESCRIBING = re.compile(
    r"(README|LICEN[CS]E|NOTICE|COPYING|CITATION|CHANGELOG|dataset_infos?|state)([-_.](md|txt|rst|json|cff|bib))?", re.I
)


@dataclass(frozen=True)
class InputFiles:
    """What is read of one `--input`."""

    files: tuple[Path, ...]  # in the order in which they are read
    formats: tuple[str, ...]  # of each file the name of the entry that reads it
    holds_texts: bool  # each file is a document
    listing: Listing = field(default_factory=lambda: Listing(()))  # counts, and what could not be accessed
    others: tuple[str, ...] = ()  # first names of files of other kinds that are left out
    containers_as_texts: int = 0  # files that look like JSON lines or archives, and are read as texts
    other_keys: tuple[str, ...] = ()  # of JSON lines that have not the wanted key, for messages
    matched: Mapping[str, int] = field(default_factory=dict)  # options with their patterns
    notes: tuple[str, ...] = ()  # about the choice of files


def list_inputs(
    path: Path,
    options: BuildOptions,
    output: Path | None = None,
    alone: bool = True,
    recogniser: Recogniser | None = None,
) -> InputFiles:
    """List the files of one input.

    A folder whose files all are containers by their names (JSON lines, Parquet, archives) or describe them (README.md,
    dataset_infos.json, ...), and a folder in which the options look for records, is read as containers; any other one
    as texts. Where a format is chosen (`BuildOptions.format`), a folder's files of its suffixes are read, or if there
    are none, all.

    Args:
        path: a container, or a folder.
        options: pattern and keys.
        output: left out where it lies below the folder.
        alone: whether it is the only input. Else the keys may be meant for another one, so a folder that holds fewer
            containers than other files is refused.
        recogniser: for these options, if there is one.

    Raises:
        InputError: there is nothing to read, or it cannot be said as what.
    """
    formats = recogniser or Recogniser(options.formats, options.read)
    if path.is_file():
        return _one_file(path, options, formats)
    if not path.is_dir():
        found = "neither a file nor a directory" if path.exists() else "no such file or directory"
        raise bad_input("--input", str(path), found, f"a directory, or {formats.in_words()}")
    choice = FolderChoice(path, options.files, options.gitignore)
    listing = list_files(path, choice, output)
    listing = replace(listing, left_out=total_counts([listing.left_out, choice.left_out]))
    if choice.problems:
        raise InputError(choice.problems)
    if not listing.files and not listing.unreadable:
        raise bad_input("--input", str(path), _nothing(listing, options), "text, JSONL, Parquet or tar files")
    if formats.chosen is not None:
        files = _chosen(path, listing, formats)
    else:
        files = _containers(path, listing, options, alone, formats) or _texts(listing, formats)
    return replace(
        files, matched=choice.matched, notes=tuple(f"{path.absolute().name}: {note}" for note in choice.notes())
    )


def _nothing(listing: Listing, options: BuildOptions) -> str:
    """What is found where no file is left."""
    counts = f" (left out: {in_words(listing.left_out)})" if listing.left_out else ""
    return f"{nothing_stays(options.files, options.gitignore)}{counts}"


def option_problems(
    inputs: Sequence[InputFiles], folders: int, licences: Sequence[str], options: BuildOptions, formats: Recogniser
) -> Iterator[Problem]:
    """Report options that can have no effect on these inputs.

    Args:
        inputs: all of them.
        folders: how many of them are folders.
        licences: of each, for documents that name none.
        options: as given.
        formats: by which the files were recognised.
    """
    containers = [file for each in inputs if not each.holds_texts for file in each.files]
    used = {name for each in inputs if not each.holds_texts for name in each.formats}
    possible = used.union(*(formats.candidates(file) for file in containers))
    keys = sorted({key for each in inputs for key in each.other_keys})
    found = f"JSON lines with the keys {', '.join(keys)}" if keys else "no JSON lines in any --input"
    if options.text_key is not None and not any(formats.use(name, "text_key") for name in used):
        expected = "JSON lines with this key, or no --text-key"
        yield Problem("--text-key", options.text_key, found, expected)
    if options.text_member is not None and not any(formats.use(name, "text_member") for name in possible):
        expected = "webdataset shards with such members, or no --text-member"
        found = f"no {formats.suffixes_of('text_member')} file in any --input"
        yield Problem("--text-member", options.text_member, found, expected)
    yield from _archive_problems(possible, options, formats)
    has_records = any(formats.use(name, "records") for name in used)
    for option, given in (("--licence-key", options.licence_key), ("--keep-key", ", ".join(options.keep_keys))):
        if given and not has_records:
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
        # Of archives of source that are inputs themselves, their members are chosen.
        of_members = option != "--gitignore" and any(formats.use(name, "members") for name in used)
        if given and not folders and not of_members:
            yield Problem(option, given, "no directory among the inputs", f"a directory, or no {option}")
    yield from _licence_problems(licences, options)
    for key, count in Counter(options.keep_keys).items():
        if count > 1:
            yield Problem("--keep-key", key, f"{count} times", "each key once")


def _archive_problems(possible: set[str], options: BuildOptions, formats: Recogniser) -> Iterator[Problem]:
    """Report `--archives` where there is no such archive, or something else has said the same.

    Args:
        possible: names of the formats that some file can have.
    """
    if options.archives is None:
        return
    if options.format is not None:
        found, expected = f"--format {options.format} beside it", "one of them"
        yield Problem("--archives", options.archives, found, expected)
    elif not any(formats.entries[name].archive_word == options.archives for name in possible):
        expected = f"{formats.shared_suffixes()} files, or no --archives"
        yield Problem("--archives", options.archives, "no such archive in any --input", expected)


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


def _one_file(path: Path, options: BuildOptions, formats: Recogniser) -> InputFiles:
    if (chosen := formats.chosen) is not None:
        return InputFiles((path,), (chosen.name,), holds_texts=chosen.takes_any_file)
    if names := formats.candidates(path):
        settled = formats.settled([(path, _narrowed(names, options, formats))])
        return InputFiles((path,), settled, holds_texts=False)
    try:
        name, keys = formats.keyed(path) or ("", None)
    except OSError as error:
        raise InputError([_unread(path, error)]) from error
    kind = kind_of_file(path)
    begins_so = kind is not None and kind.is_text and any(kind in entry.kinds for entry in formats.entries.values())
    if kind is not None and not begins_so and (keys is None or kind is TEKKEN):
        raise bad_input("--input", str(path), kind.words, kind.advice)
    if keys is None:
        expected = f"a directory, or {formats.in_words()}"
        raise bad_input("--input", str(path), "a file that holds no JSON lines", expected)
    if not options.wants_records:
        expected = f"--text-key, with which it is read as such, or a directory, or {formats.in_words()}"
        raise bad_input("--input", str(path), f"JSON lines with the keys {', '.join(keys)}", expected)
    if options.read.text_key not in keys:
        found, expected = f"JSON lines with the keys {', '.join(keys)}", f"the key {options.read.text_key!r}"
        raise bad_input("--input", str(path), found, expected)
    return InputFiles((path,), (name,), holds_texts=False)


def _unread(path: Path, error: OSError) -> Problem:
    return Problem(str(path), "--input", str(error.strerror), "a file that can be read")


def _chosen(path: Path, listing: Listing, formats: Recogniser) -> InputFiles:
    """The folder as files of the format that was chosen: those of its suffixes, or if there are none, all."""
    chosen = formats.chosen
    assert chosen is not None, "asked for where one is chosen"
    if chosen.takes_any_file:
        return InputFiles(listing.files, (chosen.name,) * len(listing.files), holds_texts=True, listing=listing)
    named = list(formats.chosen_files(listing.files))
    _require_one_split(path, named)
    read = set(named)
    others = [file for file in listing.files if file not in read]
    return _counted(path, listing, named, (chosen.name,) * len(named), others)


def _containers(
    path: Path, listing: Listing, options: BuildOptions, alone: bool, formats: Recogniser
) -> InputFiles | None:
    """The folder as containers; None where it is to be read as texts."""
    chosen: list[tuple[Path, tuple[str, ...]]] = []
    others: list[Path] = []
    unreadable = list(listing.unreadable)
    other_keys: set[str] = set()
    for file in listing.files:
        if names := formats.candidates(file):
            # Beside records, archives of source are other files.
            if options.wants_records and not _is_wanted(names, options, formats):
                others.append(file)
            else:
                chosen.append((file, names))
            continue
        try:
            name, keys = (formats.keyed(file) if options.wants_records else None) or ("", [])
        except OSError as error:
            unreadable.append(_unread(file, error))
            continue
        if options.read.text_key in keys:
            chosen.append((file, (name,)))
        else:
            others.append(file)
        other_keys |= set(keys)
    possible = {name for _, names in chosen for name in names}
    wanted = (
        options.wants_records
        or (options.archives is not None and any(formats.entries[name].archive_word for name in possible))
        or (options.text_member is not None and any(formats.use(name, "text_member") for name in possible))
    )
    describing = all(_DESCRIBING.fullmatch(file.name) for file in others)
    if not chosen or (others and not wanted and not describing):
        texts = _texts(listing, formats)
        return replace(texts, other_keys=tuple(sorted(other_keys))) if other_keys else None
    if len(others) > len(chosen) and not alone:
        found = f"{len(chosen)} files of JSON lines or archives among {len(others)} others"
        expected = "a folder of one kind beside other inputs: name its files, or build it by itself"
        raise bad_input("--input", str(path), found, expected)
    files = [file for file, _ in chosen]
    _require_one_split(path, files)
    settled = formats.settled([(file, _narrowed(names, options, formats)) for file, names in chosen])
    return _counted(path, replace(listing, unreadable=tuple(unreadable)), files, settled, others)


def _is_wanted(names: Sequence[str], options: BuildOptions, formats: Recogniser) -> bool:
    """Whether a file that can have some formats is read where records are looked for."""
    words = [formats.entries[name].archive_word for name in names]
    return any(formats.use(name, "records") for name in names) or options.archives in words


def _narrowed(names: tuple[str, ...], options: BuildOptions, formats: Recogniser) -> tuple[str, ...]:
    """Those of some formats that the options leave, all if they say nothing."""
    if options.archives is not None:
        named = tuple(name for name in names if formats.entries[name].archive_word == options.archives)
    elif options.text_member is not None:
        named = tuple(name for name in names if formats.use(name, "text_member"))
    else:
        named = ()
    return named or names


def _counted(
    path: Path, listing: Listing, files: list[Path], formats: tuple[str, ...], others: list[Path]
) -> InputFiles:
    """Some files of a folder, and the first names of the others, which are left out."""
    left_out = dict(listing.left_out) | ({OTHER_KINDS: len(others)} if others else {})
    shown = tuple(file.relative_to(path).as_posix() for file in others[:_SHOWN_NAMES])
    counted = Listing(tuple(files), left_out, listing.followed, listing.unreadable)
    return InputFiles(tuple(files), formats, False, counted, shown)


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


def _texts(listing: Listing, formats: Recogniser) -> InputFiles:
    return InputFiles(
        listing.files,
        (formats.any_file.name,) * len(listing.files),
        holds_texts=True,
        listing=listing,
        containers_as_texts=sum(map(formats.may_be_records, listing.files)),
    )
