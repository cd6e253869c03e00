"""Which text format a file has, of those of the registry: by its name, its first bytes, or what an option says."""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from ebft_mega.data.selection.format_faults import called, declared_problems
from ebft_mega.data.text.file_kinds import FileKind, first_names, in_order, kind_among, kind_of_beginning
from ebft_mega.data.text.text_files import ReadOptions
from ebft_mega.errors import InputError, Problem
from ebft_mega.extension.text_format import TextFormat
from ebft_mega.registry.kinds import TEXT_FORMATS


@dataclass(frozen=True)
class FormatChoice:
    """What is said about formats: the one that all files have, and options of entries."""

    name: str | None = None  # None: each file has the format that it is recognised as
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by the entry's name; checked

    def entry(self, name: str) -> TextFormat:
        """The entry of a name with its options."""
        values = self.options.get(name)
        return _made(entry_class(name), json.dumps(values) if values else "")

    def chosen(self) -> TextFormat | None:
        """The format that all files have; None where each is recognised.

        Raises:
            InputError: there is none of this name.
        """
        if self.name is None:
            return None
        names = TEXT_FORMATS.names()
        if self.name not in names:
            near = difflib.get_close_matches(self.name, names, 1)
            expected = f"a text format: {', '.join(names)}"
            raise InputError([Problem("--format", self.name, "no such text format", expected, *near)])
        return self.entry(self.name)


_made_entries: dict[tuple[type[TextFormat], str], TextFormat] = {}  # one is asked for at every file


def _made(kind: type[TextFormat], options: str) -> TextFormat:
    if (kind, options) not in _made_entries:
        with called(kind):
            _made_entries[kind, options] = kind(kind.Options.model_validate_json(options) if options else None)
    return _made_entries[kind, options]


def entry_class(name: str) -> type[TextFormat]:
    """The class of an entry."""
    return TEXT_FORMATS.added.get(name) or _own_class(name)


@lru_cache(maxsize=64)
def _own_class(name: str) -> type[TextFormat]:
    return TEXT_FORMATS.entry(name)


def format_classes() -> Iterator[type[TextFormat]]:
    """All entries: the package's own in alphabetical order, then those of plugins."""
    own = _own_names()
    yield from (entry_class(name) for name in own)
    yield from TEXT_FORMATS.added.values()


@lru_cache(maxsize=1)
def _own_names() -> tuple[str, ...]:
    return TEXT_FORMATS.own_names()


class Recogniser:
    """Tell formats of files apart, as the entries say.

    Args:
        formats: says which format all files have, if anything does.
        read: given to the entries.

    Raises:
        InputError: there is no such format, or an entry of a plugin can recognise nothing.
    """

    def __init__(self, formats: FormatChoice, read: ReadOptions):
        self.chosen = formats.chosen()
        self.entries = {kind.name: formats.entry(kind.name) for kind in format_classes()}
        self._read = read
        problems = [problem for kind in format_classes() for problem in declared_problems(kind, formats.name)]
        if problems:
            raise InputError(problems)
        self.any_file = next(entry for entry in self.entries.values() if entry.takes_any_file)
        names: dict[str, list[str]] = {}  # of formats, by suffix
        for entry in self.entries.values():
            for suffix in entry.suffixes:
                names.setdefault(suffix, []).append(entry.name)
        self.suffixes = tuple(names)
        self._names = {suffix: tuple(names[suffix]) for suffix in sorted(names, key=len, reverse=True)}
        self._kinds = known_kinds()
        self._by_beginning = {
            each: entry.name for entry in self.entries.values() if not entry.suffixes for each in entry.kinds
        }

    def candidates(self, file: Path) -> tuple[str, ...]:
        """Names of the formats that a file can have by its name, or else by its first bytes; none of any file's."""
        if file.name.endswith(self.suffixes):
            return next(names for suffix, names in self._names.items() if file.name.endswith(suffix))
        if self._by_beginning and (kind := kind_among(file, self._kinds)) in self._by_beginning:
            return (self._by_beginning[kind],) if kind else ()
        return ()

    def chosen_files(self, files: Sequence[Path]) -> tuple[Path, ...]:
        """Of the files of a folder those that the chosen format reads: of its suffixes, or if there are none, all."""
        if self.chosen is None or self.chosen.takes_any_file:
            return tuple(files)
        name = self.chosen.name
        return tuple(file for file in files if name in self.candidates(file)) or tuple(files)

    def use(self, name: str, *uses: str) -> bool:
        """Whether a format makes use of one of some things."""
        return bool(self.entries[name].uses.intersection(uses))

    def keyed(self, file: Path) -> tuple[str, list[str]] | None:
        """The format of a file of any name that holds records, with the keys of the first.

        Raises:
            OSError: the file cannot be read.
        """
        for entry in self.entries.values():
            with called(entry, passes=(OSError,)):
                keys = entry.first_keys(file, self._read)
            if keys is not None:
                return entry.name, keys
        return None

    def may_be_records(self, file: Path) -> bool:
        """Whether a file, read as one text, is probably meant to be read as records."""
        if self.candidates(file):
            return True
        for entry in self.entries.values():
            if file.name.endswith(entry.possible_suffixes):
                try:
                    with called(entry, passes=(OSError,)):
                        if entry.first_keys(file, ReadOptions()) is not None:
                            return True
                except OSError:  # reading it as a text will say so
                    continue
        return False

    def settled(self, files: Sequence[tuple[Path, tuple[str, ...]]]) -> tuple[str, ...]:
        """The one format of each file; those of one input that can have the same ones all have the first one's.

        Args:
            files: with the names of the formats that each can have.

        Raises:
            InputError: of one it is not clear, or it is another one.
        """
        first: dict[tuple[str, ...], str | None] = {}
        problems = []
        names = []
        for file, possible in files:
            if len(possible) == 1:
                names.append(possible[0])
                continue
            answers = []
            for name in possible:
                with called(self.entries[name]):
                    holds, looks = self.entries[name].holds(file, self._read)
                    answers.append((bool(holds), str(looks)))
            fitting = [name for name, (holds, _) in zip(possible, answers, strict=True) if holds]
            found = fitting[0] if len(fitting) == 1 else None
            if found is None or found != first.setdefault(possible, found):
                words = next(words for _, words in answers)
                expected = " or ".join(_asked_for(self.entries[name]) for name in possible)
                problems.append(Problem(str(file), "--input", words, expected))
            names.append(found or possible[0])
        if problems:
            raise InputError(problems)
        return tuple(names)

    def suffixes_of(self, use: str) -> str:
        """Suffixes of the formats that make use of something, as a phrase."""
        using = (entry.suffixes for entry in self.entries.values() if use in entry.uses)
        return ", ".join(dict.fromkeys(suffix for suffixes in using for suffix in suffixes))

    def shared_suffixes(self) -> str:
        """Suffixes that `--archives` decides about, as a phrase."""
        words = {name: entry.archive_word for name, entry in self.entries.items()}
        return ", ".join(suffix for suffix in self.suffixes if sum(map(bool, map(words.get, self._names[suffix]))) > 1)

    def in_words(self) -> str:
        """All suffixes as a phrase."""
        *others, last = self.suffixes
        return f"a {', '.join(others)} or {last} file"


def _asked_for(entry: TextFormat) -> str:
    if entry.archive_word:
        return f"--archives {entry.archive_word} ({entry.archive_meaning})"
    return f"--format {entry.name} ({entry.summary()})"


def known_kinds() -> tuple[FileKind, ...]:
    """All kinds of files that are told by their first bytes, in the order in which they are tried."""
    plugins_first = [*TEXT_FORMATS.added.values(), *(entry_class(name) for name in _own_names())]
    return in_order(each for kind in plugins_first for each in kind.kinds)


def kind_of_file(path: Path) -> FileKind | None:
    """Tell what a file is; None where it is of none of the kinds, or no regular file that can be read."""
    return kind_among(path, known_kinds())


def kind_of_bytes(content: bytes) -> FileKind | None:
    """Tell what the contents of a file are, by their beginning; None where they are of none of the kinds."""
    return kind_of_beginning(content, known_kinds())


def misnamed(path: Path, entry: TextFormat) -> FileKind | None:
    """Tell what a file is that is to be read as a format; None where it may be that, or nothing is known."""
    if not entry.refuses_other_kinds:
        return None
    kind = kind_of_file(path)
    if kind is None or (kind in entry.kinds and not path.name.endswith(entry.suffixes)):  # a name that says nothing
        return None
    of_another = (other.kinds for other in format_classes() if other is not type(entry))
    is_of_another = not kind.is_text and any(kind in kinds for kinds in of_another)
    return kind if is_of_another or not path.name.endswith(kind.names) else None


def kind_within(directory: Path, kinds: Iterable[FileKind]) -> tuple[str, FileKind] | None:
    """Find a file of some kinds in a directory: the first by its name, with its kind; None if there is none."""
    wanted = tuple(kinds)
    for name in first_names(directory):
        kind = kind_of_file(directory / name)
        if kind in wanted and kind is not None:
            return name, kind
    return None


def text_in_place_of_dataset(place: Path) -> str | None:
    """Say what text is given where a dataset is wanted; None where it is something else."""
    if place.is_file():
        kind = kind_of_file(place)
        return kind.words if kind is not None else None
    of_formats = [each for kind in format_classes() for each in kind.kinds if not each.is_text]
    inner = kind_within(place, of_formats)
    return f"a directory with {inner[0]}, {inner[1].words}" if inner else None


def archive_words() -> tuple[str, ...]:
    """What `--archives` may name."""
    return tuple(dict.fromkeys(kind.archive_word for kind in format_classes() if kind.archive_word))


def shown_reasons() -> tuple[str, ...]:
    """Reasons for which formats leave something of a file out, which the summary of a build names."""
    return tuple(dict.fromkeys(reason for kind in format_classes() for reason in kind.reasons))


def format_list() -> str:
    """All formats with what they are, as a phrase for `--help`."""
    return "; ".join(f"{name}: {words.rstrip('.')}" for name, words in TEXT_FORMATS.summaries().items())
