"""What a work unit leaves on the disk for the rest of its build: the record of its scan, shards and their record."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ebft_mega.errors import Problem
from ebft_mega.io.parse_boundary import reading

# Names of a work unit's files say "part": builds that were stopped have them.
RECORD_NAME = "part.json"
INDEX_NAME = "index.npy"
_OWN_RECORD = "a record of the build that was stopped; without its folder the build begins anew"


@dataclass(frozen=True)
class Scan:
    """What the first reading of a work unit found."""

    documents: int  # with text that can be used
    empty: int
    bad: int
    problems: tuple[Problem, ...]  # the first of them
    lines: tuple[int, ...]  # of each file range that is cut, else 0
    left_out: dict[str, int]  # what is no document, by reason
    fields: dict[str, int]  # documents that have each of the named members of records
    matched: dict[str, int]  # options with patterns that match licences or members of archives
    skipped_ranges: tuple[int, ...]  # numbers of the file ranges that could not be read to their end, without documents
    # Of a build that holds documents out: what names the groups, with counts; names of the first groups by number.
    group_kinds: dict[str, int] = field(default_factory=dict)
    group_names: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenizedUnit:
    """What the shards of a work unit hold."""

    first_document: int  # its number in the dataset
    shards: tuple[dict[str, Any], ...]  # `ShardEntry` fields
    max_token_id: int
    text_bytes: int
    licences: dict[str, int]  # documents of each
    sources: dict[str, int]
    encodings: dict[str, int]  # documents that are not UTF-8, by encoding
    skipped: dict[str, int]  # documents and files left out, by reason; its directory lists them
    not_round_trip: int  # documents whose tokens do not give back their text
    changed: tuple[str, ...]  # paths of the first of them

    @property
    def documents(self) -> int:
        """That its shards hold."""
        return sum(shard["documents"] for shard in self.shards)


def scan_path(directory: Path, number: int) -> Path:
    """The record of a scanned work unit; the digests of its documents lie beside it."""
    return directory / f"scan-{number:06d}.json"


def unit_directory(directory: Path, number: int) -> Path:
    """Directory of the shards of a tokenized work unit; it appears when they are complete."""
    return directory / f"part-{number:06d}"


def load_scan(directory: Path, number: int) -> Scan | None:
    """The record of a work unit that has been scanned, None if it has not."""
    path = scan_path(directory, number)
    if not path.is_file():
        return None
    with reading(path, path.name, _OWN_RECORD):
        fields = json.loads(path.read_bytes())
        problems = tuple(Problem(**problem) for problem in fields.pop("problems"))
        lines, skipped = tuple(fields.pop("lines")), tuple(fields.pop("skipped_ranges"))
        return Scan(problems=problems, lines=lines, skipped_ranges=skipped, **fields)


def load_digests(directory: Path, number: int) -> np.ndarray:
    """sha256 of the documents of a scanned work unit: uint8 [Scan.documents, 32], memory-mapped."""
    path = scan_path(directory, number).with_suffix(".npy")
    with reading(path, path.name, _OWN_RECORD):
        return np.load(path, mmap_mode="r", allow_pickle=False)


def groups_path(directory: Path, number: int) -> Path:
    """The groups and sizes of the documents of a scanned work unit, of a build that holds documents out."""
    return directory / f"groups-{number:06d}.npy"


def load_groups(directory: Path, number: int) -> np.ndarray:
    """GROUP_DTYPE [Scan.documents], memory-mapped."""
    path = groups_path(directory, number)
    with reading(path, path.name, _OWN_RECORD):
        return np.load(path, mmap_mode="r", allow_pickle=False)


def signatures_path(directory: Path, number: int) -> Path:
    """The signatures of the documents of a scanned work unit, where they are compared by such."""
    return directory / f"signatures-{number:06d}.npy"


def load_signatures(directory: Path, number: int) -> np.ndarray:
    """uint16 [Scan.documents, PLACES], memory-mapped."""
    path = signatures_path(directory, number)
    with reading(path, path.name, _OWN_RECORD):
        return np.load(path, mmap_mode="r", allow_pickle=False)


def load_tokenized(directory: Path, number: int) -> TokenizedUnit | None:
    """The record of a work unit that has been tokenized, None if it has not."""
    path = unit_directory(directory, number) / RECORD_NAME
    if not path.is_file():
        return None
    with reading(path, path.name, _OWN_RECORD):
        fields = json.loads(path.read_bytes())
        shards, changed = (tuple(fields.pop(name)) for name in ("shards", "changed"))
        return TokenizedUnit(shards=shards, changed=changed, **fields)


def load_unit_index(directory: Path, number: int) -> np.ndarray:
    """INDEX_DTYPE [documents of the work unit]; `shard` counts from the work unit's first shard."""
    path = unit_directory(directory, number) / INDEX_NAME
    with reading(path, path.name, _OWN_RECORD):
        return np.load(path, allow_pickle=False)
