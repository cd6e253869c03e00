"""Statistics of a dataset: lengths, rows, licences, sources; metadata of a document. Imports no torch or webdataset."""

import json
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ebft_mega.data.store.dataset import Dataset
from ebft_mega.data.store.format import TAR_BLOCK_BYTES, document_key
from ebft_mega.errors import DamagedDataError

PERCENTILES = (1, 10, 25, 50, 75, 90, 99)
_BAR_WIDTH = 50
# Read together with the tar header; most metadata fits into it.
_METADATA_BYTES = 1024


@dataclass(frozen=True)
class Lengths:
    """Lengths of documents in tokens, the end-of-document token included."""

    shortest: int
    percentiles: dict[str, int]  # by percentage; of the documents, not of their tokens
    longest: int
    mean: float
    # Documents and tokens by the largest power of two that a length reaches: bin k holds 2**k to 2**(k+1) - 1.
    documents_by_power: list[int]
    tokens_by_power: list[int]


@dataclass(frozen=True)
class Rows:
    """How documents fall into rows of a given length, in the order in which they are stored."""

    sequence_length: int
    rows: int  # whole ones
    rows_with_several_documents: int
    tail_tokens: int


def lengths_of(dataset: Dataset) -> Lengths:
    """Statistics of the lengths; takes about 25 bytes of memory per document."""
    tokens = dataset.index["tokens"].astype(np.int64)
    powers = np.frexp(tokens)[1] - 1
    ranks = np.percentile(tokens, PERCENTILES, method="lower")
    return Lengths(
        shortest=int(tokens.min()),
        percentiles={str(percent): int(value) for percent, value in zip(PERCENTILES, ranks, strict=True)},
        longest=int(tokens.max()),
        mean=float(tokens.mean()),
        documents_by_power=np.bincount(powers).tolist(),
        # Not by weights, which are floating point.
        tokens_by_power=[int(tokens[powers == power].sum()) for power in range(int(powers.max()) + 1)],
    )


def rows_of(dataset: Dataset, sequence_length: int) -> Rows:
    """Count rows in which a second document begins; a run's own order changes the share a little."""
    starts = np.cumsum(dataset.index["tokens"].astype(np.int64))[:-1]
    rows, tail = divmod(dataset.manifest.tokens, sequence_length)
    mixed = np.unique(starts[starts % sequence_length != 0] // sequence_length)
    return Rows(sequence_length, rows, int((mixed < rows).sum()), tail)


def read_metadata(dataset: Dataset, number: int) -> dict[str, object]:
    """Read where a document comes from: its `.json` member, stored between the previous document's tokens and its own.

    It has no checksum of its own; the shard's sha256 covers it.

    Raises:
        IndexError: no such document.
        DamagedDataError: there is no such member.
    """
    if not 0 <= number < dataset.manifest.documents:
        raise IndexError(f"document {number} of {dataset.manifest.documents}")
    shard = int(dataset.index["shard"][number])
    begin = 0
    if number and dataset.index["shard"][number - 1] == shard:
        _, _, offset, payload_bytes, _ = dataset.index[number - 1].item()
        begin = offset + TAR_BLOCK_BYTES + -(-payload_bytes // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES
    data = dataset.files.read(shard, begin, TAR_BLOCK_BYTES + _METADATA_BYTES)
    name = f"{document_key(number)}.json"
    try:
        member = tarfile.TarInfo.frombuf(data[:TAR_BLOCK_BYTES], "utf-8", "strict")
        found = repr(member.name)
        room = dataset.manifest.shards[shard].bytes - begin - TAR_BLOCK_BYTES
        if member.name == name and not 0 <= member.size <= room:
            found = f"one of {member.size} bytes, of which the shard has {room}"
        elif member.name == name:
            if member.size > _METADATA_BYTES:
                data = dataset.files.read(shard, begin, TAR_BLOCK_BYTES + member.size)
            metadata = json.loads(data[TAR_BLOCK_BYTES : TAR_BLOCK_BYTES + member.size])
            if isinstance(metadata, dict):
                return metadata
            found = f"a JSON {type(metadata).__name__}"
    except (tarfile.HeaderError, ValueError) as error:  # among others: no UTF-8, no JSON
        found = str(error)
    raise DamagedDataError(dataset.files.place(shard), begin, f"a member {name!r} with metadata", found, number)


def count_metadata(dataset: Dataset) -> dict[str, dict[str, int]]:
    """Documents by licence and by source; reads the metadata of every document."""
    counts: dict[str, Counter[str]] = {"licence": Counter(), "source": Counter()}
    for number in range(dataset.manifest.documents):
        metadata = read_metadata(dataset, number)
        for key, counter in counts.items():
            counter[str(metadata.get(key, "unknown"))] += 1
    return {key: dict(sorted(counter.items())) for key, counter in counts.items()}


def length_histogram(lengths: Lengths) -> list[str]:
    """Lines of text: a bar for each power of two between the shortest and the longest document."""
    counts = lengths.documents_by_power
    first = next(power for power, count in enumerate(counts) if count)
    total_tokens = sum(lengths.tokens_by_power)
    lines = [f"{'tokens':>21}  {'documents':>12}  {'of tokens':>9}"]
    for power in range(first, len(counts)):
        span = f"{2**power:,} - {2 ** (power + 1) - 1:,}"
        share = 100 * lengths.tokens_by_power[power] / total_tokens
        bar = "#" * -(-_BAR_WIDTH * counts[power] // max(counts))
        lines.append(f"{span:>21}  {counts[power]:>12,}  {share:>7.1f} %  {bar}".rstrip())
    return lines


def plot_lengths(lengths: Lengths, path: Path) -> None:
    """Draw the share of documents and of tokens by length into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    axes = figure.subplots()
    powers = np.arange(len(lengths.documents_by_power))
    for values, label, shift in (
        (lengths.documents_by_power, "documents", -0.2),
        (lengths.tokens_by_power, "their tokens", 0.2),
    ):
        shares = 100 * np.array(values) / sum(values)
        axes.bar(powers + shift, shares, width=0.4, label=label)
    first = int(np.flatnonzero(lengths.documents_by_power)[0])
    axes.set_xlim(first - 0.7, len(powers) - 0.3)
    axes.set_xticks(powers[first:], [f"{2**power:,}" for power in powers[first:].tolist()], rotation=45, fontsize=8)
    axes.set_xlabel("length of a document, tokens (from this power of two to the next)")
    axes.set_ylabel("share, %")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150, format="png")
