"""Text to a dataset directory."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ebft_mega.data.corpus import CORPUS_MANIFEST_NAME
from ebft_mega.data.format import MANIFEST_NAME, Manifest
from ebft_mega.data.inputs import read_json_object
from ebft_mega.data.output import new_directory
from ebft_mega.data.progress import track
from ebft_mega.data.sources import TextDocument, list_inputs, read_jsonl, read_text_file
from ebft_mega.data.tokenizer import Tokenizer
from ebft_mega.data.writer import DatasetWriter
from ebft_mega.errors import InputError, Problem

DEFAULT_SHARD_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class BuildResult:
    """What a build wrote and what it left out."""

    manifest: Manifest
    empty_documents: int


def build_dataset(
    source: Path,
    tokenizer: Tokenizer,
    output: Path,
    *,
    pattern: str = "*",
    text_key: str = "text",
    licence: str | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
) -> BuildResult:
    """Tokenizes every document of a source, in the order of their paths, and writes a dataset directory.

    The directory appears only when it is complete. Empty documents are left out and counted.

    Args:
        source: a directory of text files, a directory of JSONL files, or one JSONL file (`.gz` too).
        tokenizer: makes the token ids.
        output: the directory to make.
        pattern: shell pattern on the file names of a directory.
        text_key: the member of a JSON line that holds the text.
        licence: recorded with every document; None takes it from the corpus manifest of
            `tools/build_corpus.py` in or above `source`, else "unknown".
        shard_bytes: bytes after which a shard is closed.
        overwrite: replace an existing dataset.

    Raises:
        InputError: with every document that cannot be used; nothing is written then.
    """
    files, are_jsonl = list_inputs(source, pattern)
    base = source if source.is_dir() else source.parent
    licence, name = licence or _corpus_licence(source), base.absolute().name
    problems: list[Problem] = []
    empty_documents = 0
    with new_directory(output, MANIFEST_NAME, overwrite) as directory:
        writer = DatasetWriter(directory, tokenizer, shard_bytes)
        try:
            documents = _read_documents(files, base, are_jsonl, text_key)
            for item in track(documents, None if are_jsonl else len(files), "tokenizing documents"):
                if isinstance(item, Problem):
                    problems.append(item)
                elif not item.text:
                    empty_documents += 1
                elif not problems:  # after the first problem the rest is only checked
                    meta = {"licence": licence, "path": item.path, "sha256": item.sha256, "source": name}
                    writer.add(tokenizer.encode(item.text), meta)
            if not problems and not writer.num_documents:
                problems.append(Problem("--input", str(source), "no document with text", "at least one"))
            if problems:
                raise InputError(problems)
            manifest = writer.finish()
        finally:
            writer.close()
    return BuildResult(manifest, empty_documents)


def _read_documents(files: list[Path], base: Path, are_jsonl: bool, text_key: str) -> Iterator[TextDocument | Problem]:
    for file in files:
        if are_jsonl:
            yield from read_jsonl(file, base, text_key)
            continue
        try:
            document = read_text_file(file, base)
        except InputError as error:
            yield from error.problems
        else:
            yield document


def _corpus_licence(source: Path) -> str:
    for directory in (source, source.absolute().parent):
        path = directory / CORPUS_MANIFEST_NAME
        if path.is_file():
            return str(read_json_object(path, "a corpus manifest").get("licence", "unknown"))
    return "unknown"
