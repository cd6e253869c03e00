"""Contract of a text format: how a file of documents is recognised, divided and read."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from ebft_mega.data.text.file_kinds import FileKind
from ebft_mega.data.text.text_files import LONG_DOCUMENTS, UNREADABLE, BadText, ReadOptions, TextDocument, decode_text
from ebft_mega.errors import Problem
from ebft_mega.extension.entry import Entry

# What an entry makes use of. `text_key`, `text_member`: the options of these names. `records`: licence, kept members
# and groups of documents, as `ReadOptions` names them. `members`: `FilePart.choose`.
Use = Literal["text_key", "text_member", "records", "members"]


def _no_reason(name: str) -> str | None:
    return None


@dataclass(frozen=True)
class FilePart:
    """What is read at a time: a whole file, a range of its bytes, or one of its sections."""

    file: Path
    path: str  # of the file, relative to the input; paths of documents begin with it
    options: ReadOptions = ReadOptions()
    begin: int = 0  # bytes, or the number of the section
    end: int = 0  # bytes, or the number of the section after it; for a whole file its size
    is_cut: bool = False  # a range of bytes: what begins in it is read, and nothing else
    first: int | None = 0  # what `TextFormat.count` says of the ranges before; None where nobody has counted yet
    left_out: Counter[str] = field(default_factory=Counter)  # takes counts of what is no document, by reason
    choose: Callable[[str], str | None] = _no_reason  # says of a member's name why it is not read, None if it is

    def document(
        self, content: bytes, place: object, record: Mapping[str, object] | None = None
    ) -> TextDocument | BadText | None:
        """Make a document of the bytes of a text; None, and counted, where it is too long.

        Args:
            content: UTF-8, or what `--encoding-fallback` says.
            place: of the document in the file: the number of its line, say. Its path is that of the file with it.
            record: members that came with the text.
        """
        if len(content) <= self.options.max_document_bytes:
            where, path = f"{self.file}:{place}", f"{self.path}:{place}"
            document = decode_text(content, where, path, record, self.options)
            if document is not None:
                return document
        self.left_out[LONG_DOCUMENTS] += 1
        return None

    def bad(self, place: object, key: str, found: str, expected: str, reason: str) -> BadText:
        """Say that one document cannot be used; `reason` is a few words, the same for all of a kind."""
        return BadText(Problem(f"{self.file}:{place}", key, found, expected), f"{self.path}:{place}", reason)

    def unreadable(self, found: str, expected: str) -> BadText:
        """Say that the rest of the part cannot be read, so that an unknown number of documents is missing."""
        return BadText(Problem(str(self.file), "file", found, expected), self.path, UNREADABLE, is_file=True)


class Layout(NamedTuple):
    """What is known of a file before it is read."""

    # Bytes of text, about, of each section: what can be read by itself, such as a row group. None: there are none.
    sections: tuple[int, ...] | None = None
    details: Any = None  # for `option_problems` of the same entry


class TextFormat(Entry):
    """A kind of file that `tools/build_shards.py` and `tools/train_tokenizer.py` read.

    Which format a file has is told by the end of its name: of all `suffixes` that fit, the longest decides, and where
    several formats have it, `holds`. A format without suffixes is told by the first bytes of files that no suffix fits.
    `--format NAME` reads files of any name.

    What it does must be a function of the file and the options alone: a build reads every file twice, in any process.
    A fault of the file is a `BadText` in the documents' place. `OSError` and `UnicodeError` of `read` become one; any
    other error is a fault of the format, and ends the build with its file and line.
    """

    suffixes: ClassVar[tuple[str, ...]] = ()  # ends of names, such as `.jsonl`
    kinds: ClassVar[tuple[FileKind, ...]] = ()  # first bytes, by which a file under another name is named in messages
    # Of the names under which it is found among other files, which makes a note where files are read as one text each.
    possible_suffixes: ClassVar[tuple[str, ...]] = ()
    takes_any_file: ClassVar[bool] = False  # a file is a document: what a folder without other formats is read as
    uses: ClassVar[frozenset[Use]] = frozenset()
    # A file that begins as one of another kind is refused as that, with advice, before it is read.
    refuses_other_kinds: ClassVar[bool] = False
    archive_word: ClassVar[str] = ""  # by which `--archives` chooses it among formats that share a suffix
    archive_meaning: ClassVar[str] = ""  # what it then stands for
    install: ClassVar[str] = ""  # of a format with packages of its own: what they do, and how to install them
    reasons: ClassVar[tuple[str, ...]] = ()  # keys of `FilePart.left_out` that the summary of a build shows

    def import_packages(self) -> None:
        """Import the packages of its own that reading needs, to see that they are there.

        Raises:
            ImportError: one is not.
        """

    def holds(self, file: Path, options: ReadOptions) -> tuple[bool, str]:
        """Whether a file is of this format, asked where another one has the same suffix.

        Returns:
            Whether it clearly is, and what it looks like, in words.
        """
        return True, "a file whose name several formats have"

    def first_keys(self, file: Path, options: ReadOptions) -> list[str] | None:
        """The keys of a file's first record; None where it holds none.

        Where an option names a key (`--text-key`, ...), it is asked of files of any name. Those that have the text's
        key are read.

        Raises:
            OSError: the file cannot be read.
        """
        return None

    def may_be_cut(self, name: str) -> bool:
        """Whether ranges of the bytes of a file of this name can be read by themselves."""
        return False

    def layout(self, file: Path, options: ReadOptions) -> Layout:
        """What is known of a file before it is read.

        Raises:
            InputError: it is damaged; reading it, as a section 0 to 0, says how.
        """
        return Layout()

    def option_problems(self, layouts: Sequence[Layout], options: ReadOptions) -> Iterator[Problem]:
        """Report options that name what no file has. Asked where all files are of this format.

        Args:
            layouts: of the files that are not damaged.
        """
        yield from ()

    def count(self, file: Path, begin: int, end: int) -> int:
        """Count the lines, or what else documents are numbered by, of which the first byte lies in a range.

        Raises:
            OSError: the file cannot be read.
        """
        return 0

    def common_folder(self, file: Path) -> str:
        """The folder that all documents of a file lie in, as `a/b`; empty: none. For a format that uses `members`."""
        return ""

    def read(self, part: FilePart) -> Iterator[TextDocument | BadText]:
        """Read the documents of a part of a file, in their order.

        The ranges into which a file is cut are any: together they must give what the whole file gives, so a document
        belongs to the range in which its first byte lies. Memory: one document of `ReadOptions.max_document_bytes`.
        """
        raise NotImplementedError
