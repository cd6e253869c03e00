"""Documents of text from a directory of files or from JSON lines."""

import fnmatch
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ebft_mega.data.inputs import bad_input
from ebft_mega.errors import Problem

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")
_SKIPPED_DIRECTORIES = ("__pycache__",)


@dataclass(frozen=True)
class TextDocument:
    """One text and where it stands; `path` is relative to the input."""

    text: str
    sha256: str  # of the text as UTF-8
    path: str
    where: str  # file, and line in a JSONL file, for messages


def list_text_files(directory: Path, pattern: str) -> list[Path]:
    """Files below a directory whose name matches a pattern, sorted by path relative to it.

    Hidden files and folders and `__pycache__` are left out; links to folders are not followed.

    Args:
        directory: the folder to search.
        pattern: shell pattern on the file name, such as `*.py`.
    """
    found = []
    for folder, subfolders, names in os.walk(directory):
        subfolders[:] = [name for name in subfolders if name[0] != "." and name not in _SKIPPED_DIRECTORIES]
        found += [Path(folder, name) for name in names if name[0] != "." and fnmatch.fnmatchcase(name, pattern)]
    return sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(directory).as_posix())


def list_inputs(path: Path, pattern: str = "*") -> tuple[list[Path], bool]:
    """Input files in the order in which they are read.

    Args:
        path: a `.jsonl` or `.jsonl.gz` file, a directory that holds nothing else, or a directory of text
            files.
        pattern: shell pattern on the file names of a directory.

    Returns:
        The files, and whether they are JSON lines.

    Raises:
        InputError: there is nothing to read.
    """
    if path.is_file():
        if path.name.endswith(JSONL_SUFFIXES):
            return [path], True
        raise bad_input("--input", str(path), "a file", "a directory, or a .jsonl or .jsonl.gz file")
    if not path.is_dir():
        raise bad_input("--input", str(path), "no such file or directory", "a directory or JSONL file")
    files = list_text_files(path, pattern)
    if not files:
        raise bad_input("--input", str(path), f"no file that matches {pattern!r}", "text or JSONL files")
    return files, all(file.name.endswith(JSONL_SUFFIXES) for file in files)


def read_text_file(file: Path, base: Path) -> TextDocument:
    """Reads a text file exactly: line ends and byte-order marks stay as they are.

    Raises:
        InputError: the file cannot be read or is not UTF-8.
    """
    try:
        content = file.read_bytes()
        text = content.decode("utf-8")
    except OSError as error:
        raise bad_input(str(file), "text", str(error.strerror), "a readable file") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{content[error.start]:02x} at offset {error.start}"
        raise bad_input(f"{file}:{line}", "text", found, "UTF-8 text") from error
    digest = hashlib.sha256(content).hexdigest()
    return TextDocument(text, digest, file.relative_to(base).as_posix(), str(file))


def read_jsonl(file: Path, base: Path, text_key: str) -> Iterator[TextDocument | Problem]:
    """Reads the documents of a JSONL file; a bad line gives a problem in its place. Blank lines are left out.

    Args:
        file: JSON lines, plain or with gzip.
        base: the folder that document paths are relative to.
        text_key: the member of each object that holds the text.
    """
    name = file.relative_to(base).as_posix()
    number = 0
    with gzip.open(file, "rb") if file.name.endswith(".gz") else file.open("rb") as lines:
        try:
            for line in lines:
                number += 1
                if line.strip():
                    yield _parse_line(line, f"{file}:{number}", f"{name}:{number}", text_key)
        except (OSError, EOFError, zlib.error) as error:
            yield Problem(f"{file}:{number + 1}", "file", str(error), "a complete gzip file")


def _parse_line(line: bytes, where: str, path: str, text_key: str) -> TextDocument | Problem:
    expected = f"a JSON object with a string {text_key!r}"
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        return Problem(where, text_key, str(error), expected)
    if not isinstance(record, dict) or not isinstance(record.get(text_key), str):
        found = f"keys {sorted(record)}" if isinstance(record, dict) else f"a JSON {type(record).__name__}"
        if isinstance(record, dict) and text_key in record:
            found = f"a JSON {type(record[text_key]).__name__}"
        return Problem(where, text_key, found, expected)
    try:
        content = record[text_key].encode("utf-8")
    except UnicodeEncodeError as error:
        return Problem(where, text_key, f"a lone surrogate at character {error.start}", "valid Unicode text")
    return TextDocument(record[text_key], hashlib.sha256(content).hexdigest(), path, where)
