"""Read the documents of a build's inputs, whatever they are in, and leave out what is not to be read."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ebft_mega.data.selection.file_choice import FileChoice
from ebft_mega.data.selection.format_faults import called, documents_of
from ebft_mega.data.selection.held_out_split import REPOSITORY_KEYS
from ebft_mega.data.selection.licence_choice import NAMES_LICENCE, LicenceChoice
from ebft_mega.data.selection.text_formats import FormatChoice, misnamed
from ebft_mega.data.selection.text_limits import TextLimits, reason_to_leave_out
from ebft_mega.data.text.text_files import UNREADABLE, BadText, ReadOptions, TextDocument
from ebft_mega.errors import Problem
from ebft_mega.extension.text_format import FilePart


@dataclass(frozen=True)
class Input:
    """One `--input`: a directory or a file."""

    base: Path  # what the paths of its files are relative to
    source: str  # name that is recorded with every document
    licence: str  # of documents that name none
    holds_texts: bool  # each of its files is a document
    members: FileChoice = FileChoice()  # which members of archives of source are read


class FileRange(NamedTuple):
    """A whole file, a range of its bytes, or some of its sections, such as row groups of a Parquet file."""

    input: int  # position in `Reader.inputs`
    name: str  # relative to the input's base
    begin: int
    end: int  # bytes; of a file with sections their numbers
    is_cut: bool  # a range of bytes, not the whole file
    format: str  # name of the entry that reads it


@dataclass(frozen=True)
class Reader:
    """Read the documents of file ranges."""

    inputs: tuple[Input, ...]
    options: ReadOptions
    limits: TextLimits = TextLimits()
    licences: LicenceChoice = LicenceChoice()
    formats: FormatChoice = FormatChoice()

    def has_members(self, file_range: FileRange) -> bool:
        """Whether each member of a file is a document, as of an archive of source."""
        return "members" in self.formats.entry(file_range.format).uses

    def first_keys(self, file_range: FileRange) -> list[str] | None:
        """Keys of the first record of a file, see `TextFormat.first_keys`.

        Raises:
            OSError: the file cannot be read.
        """
        entry = self.formats.entry(file_range.format)
        with called(entry, passes=(OSError,)):
            return entry.first_keys(self.inputs[file_range.input].base / file_range.name, self.options)

    def common_folder_of(self, file_range: FileRange) -> Callable[[Path], str] | None:
        """What finds the folder that all of a file lies in; None where members of a file are no documents."""
        entry = self.formats.entry(file_range.format)

        def find(file: Path) -> str:
            with called(entry):
                return str(entry.common_folder(file))

        return find if self.has_members(file_range) else None

    def count(self, file_range: FileRange) -> int:
        """Lines, or what else documents are numbered by, that begin in a file range; see `TextFormat.count`.

        Raises:
            OSError: the file cannot be read.
        """
        entry = self.formats.entry(file_range.format)
        file = self.inputs[file_range.input].base / file_range.name
        with called(entry, passes=(OSError,)):
            return int(entry.count(file, file_range.begin, file_range.end))

    def read(
        self,
        file_range: FileRange,
        first: int | None,
        left_out: Counter[str] | None = None,
        matched: Counter[str] | None = None,
    ) -> Iterator[TextDocument | BadText]:
        """Read the documents of a file range that stay; both readings of a build get them here.

        Args:
            file_range: of a file of one of the inputs.
            first: what `count` says of the ranges of its file before it, see `FilePart.first`.
            left_out: takes counts of what is no document, or none that stays, by reason.
            matched: takes counts of patterns that were given and match.
        """
        of_input = self.inputs[file_range.input].licence
        for document in self._read(file_range, first, left_out, matched):
            # An empty text is counted as that.
            if isinstance(document, TextDocument) and document.text:
                if matched is not None and document.licence:
                    matched[NAMES_LICENCE] += 1
                reason = self.licences.reason_to_leave_out(document.licence or of_input, matched)
                reason = reason or reason_to_leave_out(document, self.limits)
                if reason:
                    if left_out is not None:
                        left_out[reason] += 1
                    continue
            yield document

    def _read(
        self,
        file_range: FileRange,
        first: int | None,
        left_out: Counter[str] | None,
        matched: Counter[str] | None,
    ) -> Iterator[TextDocument | BadText]:
        source = self.inputs[file_range.input]
        file = source.base / file_range.name
        entry = self.formats.entry(file_range.format)
        if (kind := misnamed(file, entry)) is not None:
            yield BadText(
                Problem(str(file), "file", kind.words, kind.advice), file_range.name, UNREADABLE, is_file=True
            )
            return
        options = self.options
        if "members" in entry.uses and options.group_keys == REPOSITORY_KEYS:
            options = replace(options, group_keys=())  # the archive is the repository, and no member has a record
        counts: Counter[str] = Counter() if left_out is None else left_out
        choose = partial(source.members.reason_to_leave_out, matched=matched)
        begin, end = file_range.begin, file_range.end
        part = FilePart(file, file_range.name, options, begin, end, file_range.is_cut, first, counts, choose)
        yield from documents_of(entry, part)
