"""The format of a dataset directory: file names, the index record and the manifest.

A dataset directory holds

    dataset.json            the manifest, see `Manifest`
    index.npy               one `INDEX_DTYPE` record per document, in document order
    shard-000000.tar ...    webdataset shards: per document `000000123.u16` (or `.u32`) and `000000123.json`
    tokenizer/              the tokenizer that made the tokens
    build.json              how it was made, see `ebft_mega.data.builder.build_record`; not read by training
    skipped.jsonl           documents that a build with --skip-bad left out, if any; not read by training

A payload holds the token ids of a whole document, little endian, without the end-of-document token: that one
is added when the document is read. Wherever a document's length is counted, its end-of-document token is
counted too.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from ebft_mega.io.records import LARGEST_COUNT, Count, Record, Sha256

FORMAT_NAME = "ebft_mega.dataset"
FORMAT_VERSION = 1
BOS_FORMAT_VERSION = 2  # of datasets whose documents begin with a token of their own, which earlier readers do not know
MANIFEST_NAME = "dataset.json"
SHARD_SUFFIX = ".tar"
MANIFEST_LIMIT_BYTES = 1 << 26  # of more than 200,000 shards
INDEX_NAME = "index.npy"
TOKENIZER_DIRECTORY = "tokenizer"
TAR_BLOCK_BYTES = 512
# Least number of documents that are shuffled together (`data/rows/order.py`): a reader needs the shards of one such
# window at a time.
WINDOW_DOCUMENTS = 131_072

INDEX_DTYPE = np.dtype(
    [
        ("shard", "<u4"),  # position in Manifest.shards
        ("crc32", "<u4"),  # of the member's tar header and payload together
        ("offset", "<u8"),  # of the member's tar header in the shard, bytes; the payload follows 512 bytes later
        ("payload_bytes", "<u8"),
        ("tokens", "<u8"),  # with the end-of-document token
    ]
)

# A plain file name: neither a folder, a URL nor a command can be written into a manifest.
ShardName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*\.tar$", max_length=255)]
_PositiveCount = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
_MAX_VOCABULARY = 1 << 32  # what the wider token type holds


class ShardEntry(Record):
    """One shard of a dataset: its size and checksum in bytes, and what it holds."""

    name: ShardName
    bytes: Count
    sha256: Sha256
    documents: _PositiveCount
    tokens: _PositiveCount


class IndexEntry(Record):
    """The index file: its size in bytes and its checksum."""

    name: Literal["index.npy"]
    bytes: Count
    sha256: Sha256


class Manifest(Record):
    """The contents of `dataset.json`.

    `tokens` counts one end-of-document token per document. `fingerprint` covers everything that decides what
    a reader gets: two datasets with one fingerprint give the same rows.
    """

    format: Literal["ebft_mega.dataset"]
    version: Literal[1, 2]
    dtype: Literal["uint16", "uint32"]
    vocab_size: Annotated[int, Field(ge=1, le=_MAX_VOCABULARY)]
    eos_id: Count
    bos_id: Count | None = None  # the first token of every payload; None: documents begin with their text
    tokenizer_sha256: Sha256
    documents: _PositiveCount
    tokens: _PositiveCount
    max_token_id: Count
    shards: tuple[ShardEntry, ...]
    index: IndexEntry
    fingerprint: Sha256


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """Narrowest of the two token types that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def payload_suffix(dtype: str) -> str:
    """Member suffix of a token type: `u16` or `u32`."""
    return {"uint16": "u16", "uint32": "u32"}[dtype]


def document_key(number: int) -> str:
    """Webdataset key of a document: its number in the dataset, never a path of the source."""
    return f"{number:09d}"


def shard_name(number: int) -> str:
    """File name of a shard: its position in the dataset."""
    return f"shard-{number:06d}{SHARD_SUFFIX}"


def fingerprint(fields: dict[str, object]) -> str:
    """sha256 over a manifest's fields, all but the fingerprint itself.

    Args:
        fields: the manifest as JSON values (`Manifest.model_dump(mode="json")`); what is not set is no part of it.
    """
    contents = {key: value for key, value in fields.items() if key != "fingerprint" and value is not None}
    return hashlib.sha256(json.dumps(contents, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file's contents, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
