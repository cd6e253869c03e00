"""The texts that a tokenizer is trained on: files of a directory, each a text or of a format."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ebft_mega.data.selection.document_reader import FileRange, Input, Reader
from ebft_mega.data.selection.file_choice import FileChoice, nothing_stays
from ebft_mega.data.selection.folder_choice import FolderChoice
from ebft_mega.data.selection.format_layouts import file_layouts
from ebft_mega.data.selection.text_formats import Recogniser
from ebft_mega.data.text.corpus import UNKNOWN_LICENCE
from ebft_mega.data.text.listing import (
    OTHER_KINDS,
    OUTSIDE_LINKS,
    TO_FOLLOW,
    in_words,
    list_files,
    readable_files,
    total_counts,
)
from ebft_mega.data.text.text_files import BadText, TextDocument
from ebft_mega.errors import InputError
from ebft_mega.io.input_errors import bad_input
from ebft_mega.io.parse_boundary import reading
from ebft_mega.io.standard_streams import print_line


@dataclass(frozen=True)
class TrainingTexts:
    """The files of a directory, and which of their texts are read."""

    source: Path
    ranges: tuple[FileRange, ...]
    reader: Reader

    def documents(self, each: FileRange, left_out: Counter[str] | None = None) -> Iterator[TextDocument | BadText]:
        """The texts of a file, or of a part of it, that stay."""
        return self.reader.read(each, 0, left_out)


def training_texts(source: Path, files: FileChoice, uses_gitignore: bool, options: Reader) -> TrainingTexts:
    """The texts of a directory, all of one format.

    Args:
        source: the directory.
        files: which of its files are read.
        uses_gitignore: whether what its `.gitignore` files name is left out.
        options: all that a reader needs beside the input.

    Raises:
        InputError: there is nothing to read, a package is missing, or an option names what no file has.
    """
    formats = Recogniser(options.formats, options.options)
    entry = formats.chosen or formats.any_file
    found = _files(source, files, uses_gitignore, formats)
    is_text = entry.takes_any_file
    reader = replace(options, inputs=(Input(source, source.name, UNKNOWN_LICENCE, is_text),))
    names = [file.relative_to(source).as_posix() for file in found]
    if entry.takes_any_file:
        return TrainingTexts(source, tuple(FileRange(0, name, 0, 0, False, entry.name) for name in names), reader)
    ranges: list[FileRange] = []
    layouts = file_layouts([(file, entry.name) for file in found], reader.formats, reader.options)
    for file, name, layout in zip(found, names, layouts, strict=True):
        if layout is None or layout.sections is not None:
            count = len(layout.sections) if layout and layout.sections is not None else 0
            sections = [(number, number + 1) for number in range(count)] or [(0, 0)]
            ranges += [FileRange(0, name, begin, end, False, entry.name) for begin, end in sections]
        else:
            with reading(file, "--input", "a file that can be read"):
                ranges.append(FileRange(0, name, 0, file.stat().st_size, False, entry.name))
    return TrainingTexts(source, tuple(ranges), reader)


def _files(source: Path, files: FileChoice, uses_gitignore: bool, formats: Recogniser) -> tuple[Path, ...]:
    """The files to read; what is left out and followed is said."""
    if not source.is_dir():
        found = "no directory" if source.exists() else "no such directory"
        raise bad_input("--input", str(source), found, "a directory of text files")
    choice = FolderChoice(source, files, uses_gitignore)
    listing = list_files(source, choice)
    if choice.problems:
        raise InputError(choice.problems)
    left_out = total_counts([listing.left_out, choice.left_out])
    if not listing.files and not listing.unreadable:
        words = f" (left out: {in_words(left_out)})" if left_out else ""
        raise bad_input("--input", str(source), f"{nothing_stays(files, uses_gitignore)}{words}", "text files")
    for meaning, counts in (("left out", left_out), ("followed", listing.followed)):
        if words := in_words(counts):
            print_line(f"note: {source}: {meaning}: {words}")
    if OUTSIDE_LINKS in listing.left_out:
        print_line(f"note: {source}: {TO_FOLLOW}")
    if unmatched := [pattern for pattern in files.given() if not choice.matched[pattern]]:
        print_line(f"note: {', '.join(unmatched)}: nothing matches")
    for note in choice.notes():
        print_line(f"note: {source}: {note}")
    if formats.chosen is not None:
        chosen = formats.chosen_files(readable_files(listing))
        if others := len(listing.files) - len(chosen):
            print_line(f"note: {source}: left out: {OTHER_KINDS}: {others}")
        return chosen
    if count := sum(map(formats.may_be_records, listing.files)):
        print_line(f"note: {source}: JSONL or tar files that are read as one text each: {count}")
    return readable_files(listing)


def documents_of_all(texts: TrainingTexts, ranges: Iterable[FileRange] | None = None) -> Iterator[TextDocument]:
    """Read files that could be read a moment ago."""
    for each in texts.ranges if ranges is None else ranges:
        for document in texts.documents(each):
            if isinstance(document, BadText):
                raise InputError([document.problem])
            yield document
