"""What formats tell of files before they are read: sections, and where they may be cut."""

from collections.abc import Sequence
from pathlib import Path

from ebft_mega.data.selection.format_faults import called
from ebft_mega.data.selection.text_formats import FormatChoice
from ebft_mega.data.text.text_files import ReadOptions
from ebft_mega.errors import InputError
from ebft_mega.extension.text_format import Layout, TextFormat
from ebft_mega.io.input_errors import bad_input
from ebft_mega.io.parse_boundary import words_of


def file_layouts(files: Sequence[tuple[Path, str]], formats: FormatChoice, options: ReadOptions) -> list[Layout | None]:
    """What the formats of some files tell of them; None for damaged ones, of which reading says what is wrong.

    Args:
        files: with the name of the entry that reads each.
        formats: options of the entries.
        options: what is read.

    Raises:
        InputError: a package is missing, or all files are of one format and an option names what none has.
    """
    entries = {name: formats.entry(name) for name in dict.fromkeys(name for _, name in files)}
    for entry in entries.values():
        _require_packages(entry)
    layouts: list[Layout | None] = []
    for file, name in files:
        with called(entries[name]):
            layouts.append(_layout(entries[name], file, options))
    found = [layout for layout in layouts if layout is not None]
    if found and len(entries) == 1:
        (entry,) = entries.values()
        with called(entry):
            problems = list(entry.option_problems(found, options))
        if problems:
            raise InputError(problems)
    return layouts


def may_be_cut(formats: FormatChoice, name: str, file: str) -> bool:
    """Whether a file of a format may be cut into ranges of its bytes.

    Args:
        formats: options of the entries.
        name: of the entry.
        file: its path.
    """
    entry = formats.entry(name)
    with called(entry):
        return bool(entry.may_be_cut(file))


def _layout(entry: TextFormat, file: Path, options: ReadOptions) -> Layout | None:
    try:
        layout = entry.layout(file, options)
    except InputError:
        return None
    if layout.sections is None:
        return layout
    return Layout(tuple(max(0, int(num_bytes)) for num_bytes in layout.sections), layout.details)


def _require_packages(entry: TextFormat) -> None:
    """Check that a format's packages are there.

    Raises:
        InputError: one is not.
    """
    try:
        with called(entry, passes=(ImportError,)):
            entry.import_packages()
    except ImportError as error:
        files = ", ".join(f"*{suffix}" for suffix in entry.suffixes) or entry.name
        raise bad_input("--input", files, words_of(error), entry.install or "its packages") from error
