"""What is wrong with the entry of a text format, as it shows when it is used: said with its file and line."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

from ebft_mega.data.text.text_files import LONG_DOCUMENTS, BadText, TextDocument
from ebft_mega.errors import EbftError, InputError, Problem
from ebft_mega.extension.entry import place_of_entry
from ebft_mega.extension.entry_fault import line_within
from ebft_mega.extension.text_format import FilePart, TextFormat
from ebft_mega.io.parse_boundary import is_of_parser, words_of

_OF_FILES = (OSError, UnicodeError)  # what `TextFormat.read` may raise about a file
_END = object()


@contextmanager
def called(entry: TextFormat | type[TextFormat], passes: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """Turn whatever a plugin's entry raises into a problem with the place in its file.

    The package's own errors, a lack of memory, a request to stop and what `passes` names pass unchanged; so does a
    fault of one of the package's own entries, which is a fault of the package.

    Raises:
        InputError: see above.
    """
    try:
        yield
    except (EbftError, MemoryError):
        raise
    except BaseException as error:
        leaves = isinstance(error, SystemExit)  # the process: that is for nobody but the tool
        if isinstance(error, passes) or not (is_of_parser(error) or leaves) or entry.is_built_in():
            raise
        raise _fault(entry, error) from error


def documents_of(entry: TextFormat, part: FilePart) -> Iterator[TextDocument | BadText]:
    """Read a part of a file by its entry.

    Of a plugin's entry, errors about the file become a `BadText`, a document that is too long is left out and counted,
    and what is no document is refused.

    Raises:
        InputError: the entry raises another error, or gives something else.
    """
    if entry.is_built_in():
        yield from entry.read(part)
        return
    documents = None
    while True:
        try:
            with called(entry, passes=_OF_FILES):
                if documents is None:
                    documents = iter(entry.read(part))
                document = next(documents, _END)
        except _OF_FILES as error:
            yield part.unreadable(words_of(error), f"a file that the format {entry.name!r} reads")
            return
        if document is _END:
            return
        if isinstance(document, TextDocument):
            num_bytes = _checked_bytes(entry, document)
            if num_bytes > part.options.max_document_bytes:
                part.left_out[LONG_DOCUMENTS] += 1
                continue
        elif not (isinstance(document, BadText) and isinstance(document.problem, Problem)):
            raise _no_document(entry, f"{document!r} from {part.file}")
        yield document


def declared_problems(kind: type[TextFormat], chosen: str | None) -> Iterator[Problem]:
    """Report what a plugin's entry says about itself and cannot be.

    Args:
        kind: of the package or of a plugin.
        chosen: name of the format that all files have; such a one recognises none.
    """
    if kind.is_built_in():
        return
    if not all(isinstance(suffix, str) and suffix for suffix in (*kind.suffixes, *kind.possible_suffixes)):
        yield _problem(place_of_entry(kind), f"the suffixes {kind.suffixes!r}", "texts such as '.txt', none empty")
    if not (kind.suffixes or kind.kinds or kind.takes_any_file or kind.name == chosen):
        found = f"a text format {kind.name!r} that recognises nothing"
        yield _problem(place_of_entry(kind), found, f"suffixes or kinds, or --format {kind.name}")


def _checked_bytes(entry: TextFormat, document: TextDocument) -> int:
    """Size of the text of a document, after all its members were looked at.

    Raises:
        InputError: one of them is none that a dataset can hold.
    """
    strings = {"text": document.text, "path": document.path, "licence": document.licence or ""}
    strings |= {"encoding": document.encoding or ""}
    for name, value in strings.items():
        if not isinstance(value, str):
            raise _no_document(entry, f"a document whose {name} is {value!r}")
    try:
        content = document.text.encode()
        json.dumps(dict(document.fields))
    except (TypeError, ValueError) as error:  # half of a surrogate pair; what JSON does not have
        raise _no_document(entry, f"the document {document.path!r} with {words_of(error)}") from None
    if document.sha256 != hashlib.sha256(content).digest():
        raise _no_document(entry, f"the document {document.path!r} with another sha256 than its text's")
    return len(content)


def _no_document(entry: TextFormat, found: str) -> InputError:
    expected = f"a TextDocument or a BadText of {type(entry).__name__}.read"
    return InputError([_problem(place_of_entry(type(entry)), found, expected)])


def _fault(entry: TextFormat | type[TextFormat], error: BaseException) -> InputError:
    """The problem of an error that an entry has raised: at the line of its own file that was reached last."""
    kind = entry if isinstance(entry, type) else type(entry)
    place = place_of_entry(kind)
    if (line := line_within(kind, error)) is not None:
        place = f"{place.rpartition(':')[0]}:{line}"
    found = f"{type(error).__name__} ({words_of(error)})"
    expected = f"the text format {entry.name!r} without an error; what is wrong with a file is a BadText"
    return InputError([_problem(place, found, expected)])


def _problem(place: str, found: str, expected: str) -> Problem:
    return Problem(place, "text format", found, expected)
