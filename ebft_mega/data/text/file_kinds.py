"""What a file is that somebody gives in the place of another one: told by its first bytes, and what to do with it."""

import re
import stat
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

_LOOKED_AT_BYTES = 4096
_MOST_NAMES = 1000  # of a folder
BUILD_IT = "python tools/build_shards.py --input makes a dataset of it"
_SAVE_IT = "tokenizer.json, which transformers writes (AutoTokenizer.from_pretrained(...).save_pretrained(...))"
_CONVERT_IT = "*.safetensors, which save_pretrained of the model in transformers writes"


@dataclass(frozen=True)
class FileKind:
    """A kind of file."""

    words: str  # with the article
    advice: str  # what is expected in its place
    beginning: re.Pattern[bytes]


def _kind(words: str, advice: str, beginning: bytes) -> FileKind:
    return FileKind(words, advice, re.compile(beginning, re.DOTALL))


_TEXT = "text: JSON lines, Parquet, archives of source, or a directory of files"
PARQUET = _kind("a Parquet file", f"a name that ends in .parquet; {BUILD_IT}", rb"PAR1")
ZIP = _kind("a zip file", f"a name that ends in .zip; {BUILD_IT}", rb"PK\x03\x04")
TEKKEN = _kind("a tekken vocabulary", _SAVE_IT, rb"\s*\{.{0,4000}\"(token_bytes|num_vocab_tokens)\"")
TIKTOKEN = _kind("a table of tokens and ranks (tiktoken)", _SAVE_IT, rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n")
GGUF = _kind("a GGUF file of weights", _CONVERT_IT, rb"GGUF")
JSON_LINES = _kind("JSON lines", BUILD_IT, rb"\s*\{\s*\"")
_GZIP = _kind(
    "a file packed by gzip",
    f"a name such as .jsonl.gz or .tar.gz; {BUILD_IT}",
    rb"\x1f\x8b",
)
_ZSTANDARD = _kind(
    "a file packed by zstandard", f"a name such as .jsonl.zst or .tar.zst; {BUILD_IT}", rb"\x28\xb5\x2f\xfd"
)
# The first that fits: what is text to a human comes last.
KINDS = (
    PARQUET,
    ZIP,
    GGUF,
    _kind(
        "an Arrow file", f"Parquet or JSON lines, which datasets' to_parquet and to_json write; {BUILD_IT}", rb"ARROW1"
    ),
    _kind("an SQLite database", _TEXT, rb"SQLite format 3\x00"),
    _kind("a PDF document", _TEXT, rb"%PDF-"),
    _kind("a pickle, which is never read", "*.safetensors or text", rb"\x80[\x02-\x05]"),
    _kind("a safetensors file of weights", "the directory that it lies in", rb".{3}\x00\x00\x00\x00\x00\{\""),
    _GZIP,
    _ZSTANDARD,
    _kind("a Git LFS pointer", "the file itself: git lfs pull fetches it", rb"version https://git-lfs"),
    TEKKEN,
    TIKTOKEN,
    JSON_LINES,
)

# Kinds that a container may be, with the ends of their names. What is text to a human may be in any JSON line.
_NAMES = {
    PARQUET.words: (".parquet",),
    ZIP.words: (".zip",),
    _GZIP.words: (".gz", ".tgz"),
    _ZSTANDARD.words: (".zst",),
    **dict.fromkeys((JSON_LINES.words, TEKKEN.words, TIKTOKEN.words), ("",)),
}


def kind_of_file(path: Path) -> FileKind | None:
    """Tell what a file is; None where it is of none of the kinds, or no regular file that can be read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return None
        with path.open("rb") as file:
            beginning = file.read(_LOOKED_AT_BYTES)
    except OSError:
        return None
    return kind_of_bytes(beginning)


def kind_of_bytes(content: bytes) -> FileKind | None:
    """Tell what the contents of a file are, by their beginning; None where they are of none of the kinds."""
    beginning = content[:_LOOKED_AT_BYTES]
    return next((kind for kind in KINDS if kind.beginning.match(beginning)), None)


def misnamed(path: Path) -> FileKind | None:
    """Tell what a container is whose name says something else; None where the name is right, or nothing is known."""
    kind = kind_of_file(path)
    if kind is None or path.name.endswith(_NAMES.get(kind.words, ())):
        return None
    return kind


def kind_within(directory: Path, kinds: tuple[FileKind, ...]) -> tuple[str, FileKind] | None:
    """Find a file of some kinds in a directory: the first by its name, with its kind; None if there is none."""
    try:
        names = sorted(entry.name for entry in islice(directory.iterdir(), _MOST_NAMES))
    except OSError:
        return None
    for name in names:
        kind = kind_of_file(directory / name)
        if kind in kinds and kind is not None:
            return name, kind
    return None


def text_in_place_of_dataset(place: Path) -> str | None:
    """Say what text is given where a dataset is wanted; None where it is something else."""
    if place.is_file():
        kind = kind_of_file(place)
        return kind.words if kind is not None else None
    inner = kind_within(place, (PARQUET, ZIP))
    return f"a directory with {inner[0]}, {inner[1].words}" if inner else None
