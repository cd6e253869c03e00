"""What can be found wrong with a dataset directory before any document is read."""

import tarfile
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from ebft_mega.data.format import (
    FORMAT_NAME,
    FORMAT_VERSION,
    INDEX_DTYPE,
    INDEX_NAME,
    MANIFEST_NAME,
    TAR_BLOCK_BYTES,
    TOKENIZER_DIRECTORY,
    Manifest,
    document_key,
    file_sha256,
    fingerprint,
    payload_suffix,
)
from ebft_mega.data.inputs import bad_input, read_json_object
from ebft_mega.data.reader import ShardFiles
from ebft_mega.data.tokenizer import tokenizer_sha256
from ebft_mega.errors import InputError, Problem


def read_manifest(directory: Path) -> Manifest:
    """Reads `dataset.json`.

    Raises:
        InputError: it is missing, of another format or version, or has wrong fields (all are listed).
    """
    path = directory / MANIFEST_NAME
    fields = read_json_object(path, "the manifest of a dataset made by tools/build_shards.py")
    found, expected = (fields.get("format"), fields.get("version")), (FORMAT_NAME, FORMAT_VERSION)
    if found != expected:
        raise bad_input(path, "format, version", found, expected)
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problems = []
        for item in error.errors():
            key = ".".join(map(str, item["loc"]))
            problems.append(Problem(str(path), key, repr(item["input"])[:200], item["msg"]))
        raise InputError(problems) from error


def manifest_problems(directory: Path, manifest: Manifest) -> list[Problem]:
    """Contradictions between the manifest's own fields, and with the tokenizer beside it."""
    where = str(directory / MANIFEST_NAME)
    tokenizer = tokenizer_sha256(directory / TOKENIZER_DIRECTORY)
    below_vocab = f"a token id below vocab_size {manifest.vocab_size}"
    expected_values: list[tuple[str, object, object]] = [
        ("fingerprint", manifest.fingerprint, fingerprint(manifest.model_dump(mode="json"))),
        ("documents", manifest.documents, sum(shard.documents for shard in manifest.shards)),
        ("tokens", manifest.tokens, sum(shard.tokens for shard in manifest.shards)),
    ]
    problems = [
        Problem(where, key, str(found), str(expected)) for key, found, expected in expected_values if found != expected
    ]
    for key, token in (("max_token_id", manifest.max_token_id), ("eos_id", manifest.eos_id)):
        if token >= manifest.vocab_size:
            problems.append(Problem(where, key, str(token), below_vocab))
    if tokenizer != manifest.tokenizer_sha256:
        found = f"a tokenizer with sha256 {tokenizer}" if tokenizer else "no tokenizer"
        expected = f"the tokenizer that made the tokens, sha256 {manifest.tokenizer_sha256}"
        problems.append(Problem(str(directory / TOKENIZER_DIRECTORY), "tokenizer", found, expected))
    return problems


def shard_problems(directory: Path, manifest: Manifest) -> list[Problem]:
    """Shards that are missing or of another size."""
    problems = []
    for entry in manifest.shards:
        path = directory / entry.name
        found = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
        expected = f"{entry.bytes} bytes"
        if found != expected:
            problems.append(Problem(str(path), entry.name, found, expected))
    return problems


def index_problems(directory: Path, manifest: Manifest) -> list[Problem]:
    """What differs between the index file and its description: presence, size, hash, then its records."""
    path = directory / INDEX_NAME

    def problem(found: object, expected: object) -> list[Problem]:
        return [Problem(str(path), "index", str(found), str(expected))]

    if not path.is_file():
        return problem("no such file", f"{manifest.index.bytes} bytes")
    if path.stat().st_size != manifest.index.bytes:
        return problem(f"{path.stat().st_size} bytes", f"{manifest.index.bytes} bytes")
    found = file_sha256(path)
    if found != manifest.index.sha256:
        return problem(f"sha256 {found}", f"sha256 {manifest.index.sha256}")
    try:
        index = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:  # among others: pickled objects, which are never loaded
        return problem(error, f"records of {INDEX_DTYPE}")
    if index.dtype != INDEX_DTYPE or index.shape != (manifest.documents,):
        return problem(f"{index.shape} of {index.dtype}", f"({manifest.documents},) of {INDEX_DTYPE}")
    return []


def swapped_shard_problems(directory: Path, manifest: Manifest, index: np.ndarray, files: ShardFiles) -> list[Problem]:
    """Shards that stand in another one's place.

    Equal sizes hide a swap from the size check. The header of a shard's first document carries that
    document's number; anything else that is wrong with it is damage, and found when the document is read.

    Args:
        directory: the dataset.
        manifest: its manifest.
        index: INDEX_DTYPE [documents].
        files: its shard files.
    """
    suffix = payload_suffix(manifest.dtype)
    first_documents = np.cumsum([0] + [shard.documents for shard in manifest.shards[:-1]])
    first_members = [f"{document_key(int(document))}.{suffix}" for document in first_documents]
    shard_of_member = dict(zip(first_members, manifest.shards, strict=True))
    problems = []
    for number, (expected, entry) in enumerate(shard_of_member.items()):
        header = files.read(number, int(index["offset"][first_documents[number]]), TAR_BLOCK_BYTES)
        try:
            found = tarfile.TarInfo.frombuf(header, "utf-8", "strict").name
        except (tarfile.HeaderError, UnicodeDecodeError):
            continue
        owner = shard_of_member.get(found, entry)
        if owner is not entry:
            where = str(directory / entry.name)
            problems.append(Problem(where, entry.name, f"the contents of {owner.name} ({found})", expected))
    return problems
