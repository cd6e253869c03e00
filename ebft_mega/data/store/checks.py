"""Checks of a dataset before any document is read: manifest, tokenizer copy, index, sizes and order of the shards."""

import tarfile
from collections import Counter
from pathlib import Path

import numpy as np

from ebft_mega.data.selection.held_out_split import HELD_OUT, TRAIN
from ebft_mega.data.store.format import (
    BOS_FORMAT_VERSION,
    FORMAT_NAME,
    FORMAT_VERSION,
    INDEX_DTYPE,
    INDEX_NAME,
    MANIFEST_LIMIT_BYTES,
    MANIFEST_NAME,
    TAR_BLOCK_BYTES,
    TOKENIZER_DIRECTORY,
    Manifest,
    document_key,
    file_sha256,
    fingerprint,
    payload_suffix,
)
from ebft_mega.data.store.index_file import MAX_HEADER_BYTES, header_bytes, load_index
from ebft_mega.data.store.reader import ShardBytes
from ebft_mega.data.tokenizers.tokenizer import tokenizer_sha256
from ebft_mega.data.tokenizers.tokenizer_files import read_tokenizer_files
from ebft_mega.errors import BrokenCheckpointError, InputError, Problem
from ebft_mega.io.contained_files import leaves, read_contained
from ebft_mega.io.input_errors import bad_input, file_obstacle, lfs_pointer
from ebft_mega.io.json_text import parse_json
from ebft_mega.io.parse_boundary import reading
from ebft_mega.io.records import MAX_PROBLEMS, NEWER, parse_record

_MANIFEST = "the manifest of a dataset made by tools/build_shards.py"


def read_manifest(directory: Path) -> Manifest:
    """Read `dataset.json`.

    Raises:
        InputError: it is missing, of another format or version, or has wrong fields (all are listed).
    """
    path = directory / MANIFEST_NAME
    if not path.exists() and (directory / TRAIN / MANIFEST_NAME).is_file():
        others = sorted(path.parent.name for path in directory.glob(f"*/{MANIFEST_NAME}") if path.parent.name != TRAIN)
        names = [TRAIN, *(others or [HELD_OUT])]
        count = "two" if len(names) == 2 else str(len(names))
        several = f"a directory of {count} datasets, {', '.join(names[:-1])} and {names[-1]}"
        expected = " or ".join(str(directory / name) for name in names)
        raise bad_input(directory, "dataset", f"{several}, of which each has its {MANIFEST_NAME}", expected)
    content = read_contained(directory, MANIFEST_NAME, MANIFEST_LIMIT_BYTES, _MANIFEST)
    if found := lfs_pointer(content):
        raise bad_input(path, MANIFEST_NAME, found, _MANIFEST)
    return parse_manifest(content, str(path))


def parse_manifest(content: bytes, where: str) -> Manifest:
    """Read the contents of a `dataset.json`.

    Args:
        content: the file's bytes.
        where: its path or URL, for messages.

    Raises:
        InputError: as `read_manifest`.
    """
    with reading(where, MANIFEST_NAME, _MANIFEST):
        fields = parse_json(content.decode("utf-8"))
    if not isinstance(fields, dict):
        raise bad_input(where, MANIFEST_NAME, f"a JSON {type(fields).__name__}", _MANIFEST)
    found, expected = (fields.get("format"), fields.get("version")), (FORMAT_NAME, FORMAT_VERSION)
    if found not in (expected, (FORMAT_NAME, BOS_FORMAT_VERSION)):
        is_newer = found[0] == FORMAT_NAME and type(found[1]) is int and found[1] > BOS_FORMAT_VERSION
        raise bad_input(where, "format, version", f"{found!r:.200}{f', {NEWER}' * is_newer}", expected)
    try:
        return parse_record(Manifest, content, where)
    except BrokenCheckpointError as error:  # a dataset is none
        raise InputError(error.problems) from error


def fingerprint_problems(where: str, manifest: Manifest) -> list[Problem]:
    """Report a fingerprint that differs from the one computed from the manifest's other fields."""
    expected = fingerprint(manifest.model_dump(mode="json"))
    if manifest.fingerprint == expected:
        return []
    return [Problem(where, "fingerprint", manifest.fingerprint, expected)]


def manifest_problems(where: str, manifest: Manifest) -> list[Problem]:
    """Report contradictions between the manifest's own fields.

    Args:
        where: path or URL of the manifest, for messages.
        manifest: the manifest.
    """
    below_vocab = f"a token id below vocab_size {manifest.vocab_size}"
    problems = fingerprint_problems(where, manifest)
    for key, found, expected in (
        ("documents", manifest.documents, sum(shard.documents for shard in manifest.shards)),
        ("tokens", manifest.tokens, sum(shard.tokens for shard in manifest.shards)),
    ):
        if found != expected:
            problems.append(Problem(where, key, str(found), str(expected)))
    if (manifest.bos_id is None) != (manifest.version == FORMAT_VERSION):
        wanted = "none" if manifest.version == FORMAT_VERSION else "a token id"
        problems.append(Problem(where, "bos_id", str(manifest.bos_id), f"{wanted} in version {manifest.version}"))
    ids = (("max_token_id", manifest.max_token_id), ("eos_id", manifest.eos_id), ("bos_id", manifest.bos_id))
    for key, token in ids:
        if token is not None and token >= manifest.vocab_size:
            problems.append(Problem(where, key, str(token), below_vocab))
    problems += _size_problems(where, manifest)
    names = Counter(shard.name for shard in manifest.shards)
    for name, count in names.items():
        if count > 1:
            problems.append(Problem(where, "shards", f"{count} shards named {name}", "different names"))
    return problems


def _size_problems(where: str, manifest: Manifest) -> list[Problem]:
    """Numbers that no files could have: what is read and reserved is computed from them."""
    problems = []
    header = header_bytes(manifest.index.bytes, manifest.documents)
    if not 0 < header <= MAX_HEADER_BYTES:
        records = f"{manifest.documents} records of {INDEX_DTYPE.itemsize} bytes"
        expected = f"{records} and a header of at most {MAX_HEADER_BYTES}"
        problems.append(Problem(where, "index.bytes", str(manifest.index.bytes), expected))
    itemsize = np.dtype(manifest.dtype).itemsize
    for shard in manifest.shards:
        # A document has a tar header, and a token that is not stored: the one that ends it.
        least = shard.documents * TAR_BLOCK_BYTES + (shard.tokens - shard.documents) * itemsize
        if shard.tokens < shard.documents or shard.bytes < least:
            found = f"{shard.bytes} bytes with {shard.documents} documents and {shard.tokens} tokens"
            expected = f"a token per document at least, and {least} bytes or more"
            problems.append(Problem(where, shard.name, found, expected))
        if len(problems) == MAX_PROBLEMS:
            break
    return problems


def tokenizer_problems(directory: Path, manifest: Manifest) -> list[Problem]:
    """Report a copy of the tokenizer that is missing, not the one that made the tokens, or more than a tokenizer.

    It goes into checkpoints as it is, so none of its files may lie elsewhere or be something else.
    """
    place = directory / TOKENIZER_DIRECTORY
    if (outside := leaves(directory, place)) is not None:
        found = f"a link to {outside}, which is outside of its directory"
        return [Problem(str(place), "tokenizer", found, "the dataset's own copy of the tokenizer")]
    try:
        read_tokenizer_files(place)
        tokenizer = tokenizer_sha256(place)
    except InputError as error:
        return list(error.problems)
    if tokenizer == manifest.tokenizer_sha256:
        return []
    found = f"a tokenizer with sha256 {tokenizer}" if tokenizer else "no tokenizer"
    expected = f"the tokenizer that made the tokens, sha256 {manifest.tokenizer_sha256}"
    return [Problem(str(place), "tokenizer", found, expected)]


def shard_problems(directory: Path, manifest: Manifest) -> list[Problem]:
    """Report shard files that are missing or have another size than the manifest says."""
    problems = []
    for entry in manifest.shards:
        path = directory / entry.name
        found = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
        expected = f"{entry.bytes} bytes"
        if found != expected:
            problems.append(Problem(str(path), entry.name, found, expected))
    return problems


def index_problems(directory: Path, manifest: Manifest) -> list[Problem]:
    """Compare the index file with its entry in the manifest: presence, size, sha256, then its records."""
    path = directory / INDEX_NAME

    def problem(found: object, expected: object) -> list[Problem]:
        return [Problem(str(path), "index", str(found), str(expected))]

    if (obstacle := file_obstacle(path)) is not None:
        return problem(obstacle, f"{manifest.index.bytes} bytes")
    if path.stat().st_size != manifest.index.bytes:
        return problem(f"{path.stat().st_size} bytes", f"{manifest.index.bytes} bytes")
    found = file_sha256(path)
    if found != manifest.index.sha256:
        return problem(f"sha256 {found}", f"sha256 {manifest.index.sha256}")
    try:
        index = load_index(path)
    except InputError as error:
        return list(error.problems)
    if len(index) != manifest.documents:
        return problem(f"{len(index)} records", f"{manifest.documents} records")
    return record_problems(str(path), np.asarray(index), manifest)


def record_problems(where: str, index: np.ndarray, manifest: Manifest) -> list[Problem]:
    """Report records that contradict the manifest or each other: the first one of each shard.

    Within a shard, documents must be stored in the order of their numbers and without overlap, begin at a multiple of
    the tar block and end within the shard's size. Their number and their tokens must add up to the manifest's.

    Args:
        where: path of the index, for messages.
        index: INDEX_DTYPE [documents].
        manifest: of the dataset.
    """
    if len(index) != sum(entry.documents for entry in manifest.shards):
        return []  # a contradiction within the manifest, which `manifest_problems` reports
    itemsize = np.dtype(manifest.dtype).itemsize
    problems, first = [], 0
    for number, entry in enumerate(manifest.shards):
        records = index[first : first + entry.documents]
        offset, payload_bytes, tokens = (records[name] for name in ("offset", "payload_bytes", "tokens"))
        # The sum of 64-bit numbers may overflow, so each of them alone must lie within the shard, too.
        stop = offset + payload_bytes + np.uint64(TAR_BLOCK_BYTES)
        right = records["shard"] == number
        right &= (offset <= entry.bytes) & (payload_bytes <= entry.bytes) & (stop <= entry.bytes)
        right &= offset % np.uint64(TAR_BLOCK_BYTES) == 0
        right &= tokens * np.uint64(itemsize) == payload_bytes + np.uint64(itemsize)
        right[1:] &= offset[1:] >= stop[:-1]
        if not right.all():
            wrong = int(np.argmin(right))
            found = f"{records[wrong]} of {', '.join(INDEX_DTYPE.names or ())}"
            expected = f"a member of shard {number} after the previous one, within {entry.bytes} bytes"
            problems.append(Problem(where, f"document {first + wrong}", found, expected))
        elif int(tokens.sum()) != entry.tokens:
            problems.append(Problem(where, entry.name, f"{int(tokens.sum())} tokens", f"{entry.tokens} tokens"))
        first += entry.documents
    return problems


def swapped_shard_problems(directory: Path, manifest: Manifest, index: np.ndarray, files: ShardBytes) -> list[Problem]:
    """Report shard files that hold the contents of another shard.

    Two swapped shards of equal size pass the size check. The tar header of a shard's first document contains that
    document's number. Anything else that is wrong with this header is damage, found when the document is read.

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
