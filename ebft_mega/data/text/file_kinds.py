"""What a file is that somebody gives in the place of another one: told by its first bytes, and what to do with it."""

import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

_LOOKED_AT_BYTES = 4096
_MOST_NAMES = 1000  # of a folder
BUILD_IT = "python tools/build_shards.py --input makes a dataset of it"
_SAVE_IT = "tokenizer.json, which transformers writes (AutoTokenizer.from_pretrained(...).save_pretrained(...))"
_CONVERT_IT = "*.safetensors, which save_pretrained of the model in transformers writes"
ANY_NAME = ("",)  # of what is text to a human: it may be in any JSON line


@dataclass(frozen=True)
class FileKind:
    """A kind of file."""

    words: str  # with the article
    advice: str  # what is expected in its place
    beginning: re.Pattern[bytes]
    names: tuple[str, ...] = ()  # ends of the names under which it is what it should be
    is_text: bool = False  # to a human too: all others are tried first


def kind(words: str, advice: str, beginning: bytes, names: tuple[str, ...] = (), *, is_text: bool = False) -> FileKind:
    """A kind of file, told by a regular expression that its first 4,096 bytes match from their start."""
    return FileKind(words, advice, re.compile(beginning, re.DOTALL), names, is_text)


_TEXT = "text: JSON lines, Parquet, archives of source, or a directory of files"
TEKKEN = kind(
    "a tekken vocabulary",
    _SAVE_IT,
    rb"\s*\{.{0,4000}\"(token_bytes|num_vocab_tokens)\"",
    ANY_NAME,
    is_text=True,
)
TIKTOKEN = kind(
    "a table of tokens and ranks (tiktoken)", _SAVE_IT, rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n", ANY_NAME, is_text=True
)
JSON_LINES = kind("JSON lines", BUILD_IT, rb"\s*\{\s*\"", ANY_NAME, is_text=True)
# Kinds that no text format of the package reads.
NO_FORMATS = (
    kind("a GGUF file of weights", _CONVERT_IT, rb"GGUF"),
    kind(
        "an Arrow file", f"Parquet or JSON lines, which datasets' to_parquet and to_json write; {BUILD_IT}", rb"ARROW1"
    ),
    kind("an SQLite database", _TEXT, rb"SQLite format 3\x00"),
    kind("a PDF document", _TEXT, rb"%PDF-"),
    kind("a pickle, which is never read", "*.safetensors or text", rb"\x80[\x02-\x05]"),
    kind("a safetensors file of weights", "the directory that it lies in", rb".{3}\x00\x00\x00\x00\x00\{\""),
    kind("a file packed by gzip", f"a name such as .jsonl.gz or .tar.gz; {BUILD_IT}", rb"\x1f\x8b", (".gz", ".tgz")),
    kind(
        "a file packed by zstandard",
        f"a name such as .jsonl.zst or .tar.zst; {BUILD_IT}",
        rb"\x28\xb5\x2f\xfd",
        (".zst",),
    ),
    kind(
        "a Git LFS pointer",
        "the file itself: git lfs pull fetches it",
        rb"version https://git-lfs",
        is_text=True,
    ),
    TEKKEN,
    TIKTOKEN,
)


def in_order(of_formats: Iterable[FileKind]) -> tuple[FileKind, ...]:
    """All kinds in the order in which they are tried, of which the first that fits is taken.

    Args:
        of_formats: kinds that formats read. Before the others, but after what is a more special text.
    """
    kinds = tuple(of_formats)
    binary = [each for each in (*kinds, *NO_FORMATS) if not each.is_text]
    return (*binary, *(each for each in (*NO_FORMATS, *kinds) if each.is_text))


def kind_among(path: Path, kinds: Sequence[FileKind]) -> FileKind | None:
    """Tell which of some kinds a file is; None where it is none, or no regular file that can be read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return None
        with path.open("rb") as file:
            beginning = file.read(_LOOKED_AT_BYTES)
    except OSError:
        return None
    return kind_of_beginning(beginning, kinds)


def kind_of_beginning(content: bytes, kinds: Sequence[FileKind]) -> FileKind | None:
    """Tell which of some kinds the contents of a file are, by their beginning; None where they are none."""
    beginning = content[:_LOOKED_AT_BYTES]
    return next((each for each in kinds if each.beginning.match(beginning)), None)


def first_names(directory: Path) -> list[str]:
    """Some names in a directory, sorted; none where it cannot be read."""
    try:
        return sorted(entry.name for entry in islice(directory.iterdir(), _MOST_NAMES))
    except OSError:
        return []
