"""Read the documents of a build's inputs, whatever they are in, and leave out what is not to be read."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ebft_mega.data.selection.file_choice import FileChoice
from ebft_mega.data.selection.held_out_split import REPOSITORY_KEYS
from ebft_mega.data.selection.licence_choice import NAMES_LICENCE, LicenceChoice
from ebft_mega.data.selection.text_limits import TextLimits, reason_to_leave_out
from ebft_mega.data.text.archives import read_text_archive
from ebft_mega.data.text.file_kinds import misnamed
from ebft_mega.data.text.parquet_files import read_parquet
from ebft_mega.data.text.source_archives import is_source_archive, read_source_archive
from ebft_mega.data.text.text_files import (
    ARCHIVE_SUFFIX,
    PARQUET_SUFFIX,
    UNREADABLE,
    BadText,
    ReadOptions,
    TextDocument,
    read_jsonl,
    read_text_file,
)
from ebft_mega.errors import Problem


@dataclass(frozen=True)
class Input:
    """One `--input`: a directory of text files, or containers (JSONL files, text webdataset shards)."""

    base: Path  # what the paths of its files are relative to
    source: str  # name that is recorded with every document
    licence: str  # of documents that name none
    holds_texts: bool
    source_archives: bool = False  # plain tar files are archives of source too
    members: FileChoice = FileChoice()  # which members of archives of source are read

    def is_source_archive(self, name: str) -> bool:
        """Whether each member of one of its files is a text."""
        return is_source_archive(name) or (self.source_archives and name.endswith(ARCHIVE_SUFFIX))


class FileRange(NamedTuple):
    """A whole file, a range of the lines of a plain JSONL file, or some row groups of a Parquet file."""

    input: int  # position in `Reader.inputs`
    name: str  # relative to the input's base
    begin: int
    end: int  # bytes; of a Parquet file numbers of row groups
    is_cut: bool  # a range of lines, not the whole file


@dataclass(frozen=True)
class Reader:
    """Read the documents of file ranges."""

    inputs: tuple[Input, ...]
    options: ReadOptions
    limits: TextLimits = TextLimits()
    licences: LicenceChoice = LicenceChoice()

    def read(
        self,
        file_range: FileRange,
        first_line: int | None,
        left_out: Counter[str] | None = None,
        matched: Counter[str] | None = None,
    ) -> Iterator[TextDocument | BadText]:
        """Read the documents of a file range that stay; both readings of a build get them here.

        Args:
            file_range: of a file of one of the inputs.
            first_line: lines of its file before it, see `read_jsonl`.
            left_out: takes counts of what is no document, or none that stays, by reason.
            matched: takes counts of patterns that were given and match.
        """
        of_input = self.inputs[file_range.input].licence
        for document in self._read(file_range, first_line, left_out, matched):
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
        first_line: int | None,
        left_out: Counter[str] | None,
        matched: Counter[str] | None,
    ) -> Iterator[TextDocument | BadText]:
        source = self.inputs[file_range.input]
        file = source.base / file_range.name
        if source.holds_texts:
            document = read_text_file(file, file_range.name, self.options, left_out)
            if document is not None:
                yield document
        elif (kind := misnamed(file)) is not None:
            yield BadText(
                Problem(str(file), "file", kind.words, kind.advice), file_range.name, UNREADABLE, is_file=True
            )
        elif file_range.name.endswith(PARQUET_SUFFIX):
            groups = range(file_range.begin, file_range.end)
            yield from read_parquet(file, file_range.name, self.options, groups, left_out)
        elif source.is_source_archive(file_range.name):
            choose = partial(source.members.reason_to_leave_out, matched=matched)
            options = self.options
            if options.group_keys == REPOSITORY_KEYS:  # the archive is the repository, and no member has a record
                options = replace(options, group_keys=())
            yield from read_source_archive(file, file_range.name, options, left_out, choose)
        elif file_range.name.endswith(ARCHIVE_SUFFIX):
            yield from read_text_archive(file, file_range.name, self.options, left_out)
        else:
            end = file_range.end if file_range.is_cut else None
            yield from read_jsonl(file, file_range.name, self.options, file_range.begin, end, first_line, left_out)
