"""Datasets that lie in memory: the reading side without files and without the tools that write them."""

import hashlib
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ebft_mega.data.store.dataset import Dataset
from ebft_mega.data.store.format import INDEX_DTYPE, TAR_BLOCK_BYTES, Manifest, token_dtype

EOS = 1


class MemoryShards:
    """Shards as byte strings; remembers what was announced."""

    def __init__(self, shards: list[bytes]):
        self.shards = shards
        self.announced: list[list[int]] = []
        self.num_reads = 0

    def read(self, shard: int, offset: int, num_bytes: int) -> bytes:
        self.num_reads += 1
        return self.shards[shard][offset : offset + num_bytes]

    def place(self, shard: int) -> str:
        return f"memory/shard-{shard:06d}.tar"

    def expect(self, shards: Sequence[int]) -> None:
        self.announced.append(list(shards))

    def close(self) -> None:
        pass


def memory_dataset(shards: Sequence[Sequence[Sequence[int]]], vocab_size: int = 1000, name: str = "memory") -> Dataset:
    """A dataset of documents given as token ids, without their end tokens, by shard."""
    stored_type = np.dtype(token_dtype(vocab_size)).newbyteorder("<")
    records = []
    contents = []
    for number, documents in enumerate(shards):
        data = b""
        for document in documents:
            member = os.urandom(TAR_BLOCK_BYTES) + np.asarray(document, np.int64).astype(stored_type).tobytes()
            payload_bytes = len(member) - TAR_BLOCK_BYTES
            records.append((number, zlib.crc32(member), len(data), payload_bytes, len(document) + 1))
            data += member
        contents.append(data)
    manifest = synthetic_manifest(
        [len(documents) for documents in shards],
        [sum(len(document) + 1 for document in documents) for documents in shards],
        vocab_size,
        name,
    )
    return Dataset(Path(name), manifest, np.array(records, INDEX_DTYPE), MemoryShards(contents))


def synthetic_manifest(
    shard_documents: Sequence[int], shard_tokens: Sequence[int], vocab_size: int, name: str
) -> Manifest:
    """The manifest of a dataset that need not exist; another name has another fingerprint."""
    digest = hashlib.sha256(name.encode()).hexdigest()
    shards = [
        {"name": f"shard-{number:06d}.tar", "bytes": 0, "sha256": digest, "documents": documents, "tokens": tokens}
        for number, (documents, tokens) in enumerate(zip(shard_documents, shard_tokens, strict=True))
    ]
    return Manifest.model_validate(
        {
            "format": "ebft_mega.dataset",
            "version": 1,
            "dtype": token_dtype(vocab_size),
            "vocab_size": vocab_size,
            "eos_id": EOS,
            "tokenizer_sha256": "0" * 64,
            "documents": sum(shard_documents),
            "tokens": sum(shard_tokens),
            "max_token_id": vocab_size - 1,
            "shards": tuple(shards),
            "index": {"name": "index.npy", "bytes": 0, "sha256": digest},
            "fingerprint": digest,
        }
    )


def damage(dataset: Dataset, document: int) -> None:
    """Flips one bit in a document's payload."""
    assert isinstance(dataset.files, MemoryShards)
    record = dataset.index[document]
    shard, place = int(record["shard"]), int(record["offset"]) + TAR_BLOCK_BYTES
    data = bytearray(dataset.files.shards[shard])
    data[place] ^= 1
    dataset.files.shards[shard] = bytes(data)
