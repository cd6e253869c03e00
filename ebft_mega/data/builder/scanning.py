"""The first reading of a work unit: count its documents, hash them, and find what cannot be used."""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from ebft_mega.data.builder.array_files import write_array
from ebft_mega.data.builder.unit_files import Scan, groups_path, scan_path, signatures_path
from ebft_mega.data.builder.worker_pool import Advance
from ebft_mega.data.selection.deduplication import DIGEST_BYTES
from ebft_mega.data.selection.document_reader import FileRange, Reader
from ebft_mega.data.selection.held_out_split import GROUP_DTYPE, Group, Grouping, SplitOptions
from ebft_mega.data.selection.near_duplicates import PLACES, signature
from ebft_mega.data.text.text_files import BadText
from ebft_mega.errors import Problem
from ebft_mega.io.durable import write_bytes

# Of one work unit: a wrong --text-key makes every line of a dump a problem.
MAX_LISTED_PROBLEMS = 1000
# Of a work unit: names of groups for messages.
_MOST_NAMED_GROUPS, _SHOWN_CHARACTERS = 1000, 100


@dataclass(frozen=True)
class ScanJob:
    """A work unit, and the directory for its record."""

    reader: Reader
    work_unit: tuple[FileRange, ...]
    number: int
    directory: Path
    skip_bad: bool
    split: SplitOptions | None = None
    with_signatures: bool = False  # see `near_duplicates.signature`
    is_all: bool = False  # one whole file, which is all that the build reads


def scan_work_unit(job: ScanJob, advance: Advance) -> tuple[int, Scan]:
    """Read and hash the documents of a work unit and write its record; return the work unit's number and the record.

    Memory: one document, and 32 bytes for each document of the work unit, with signatures 544.
    """
    found = _Found()
    lines = []
    skipped_ranges = []
    for number, file_range in enumerate(job.work_unit):
        if len(found.problems) >= MAX_LISTED_PROBLEMS:
            break
        try:
            lines.append(job.reader.count(file_range) if file_range.is_cut else 0)
        except OSError:
            lines.append(0)  # reading it gives the problem
        own = _Found()
        whole = _scan_range(job, file_range, own, advance)
        if whole:
            found.add(own)
        else:
            # Nothing vouches for what came before the damage: a checksum stands at the end of what it covers.
            skipped_ranges.append(number)
            found.bad += 1
    path = scan_path(job.directory, job.number)
    hashes = np.frombuffer(found.digests, np.uint8).reshape(-1, DIGEST_BYTES)
    write_array(path.with_suffix(".npy"), hashes.dtype, hashes.shape, [hashes])  # before the record that says so
    if job.split:
        groups = np.frombuffer(found.groups, GROUP_DTYPE)
        write_array(groups_path(job.directory, job.number), groups.dtype, groups.shape, [groups])
    if job.with_signatures:
        signatures = np.frombuffer(found.signatures, np.uint16).reshape(-1, PLACES)
        write_array(signatures_path(job.directory, job.number), signatures.dtype, signatures.shape, [signatures])
    scan = Scan(
        documents=len(hashes),
        empty=found.empty,
        bad=found.bad,
        problems=tuple(found.problems[:MAX_LISTED_PROBLEMS]),
        lines=tuple(lines),
        left_out=dict(found.left_out),
        fields=dict(found.fields),
        matched=dict(found.matched),
        skipped_ranges=tuple(skipped_ranges),
        group_kinds=dict(found.group_kinds),
        group_names=found.group_names,
    )
    write_bytes(path, json.dumps(asdict(scan)).encode())
    return job.number, scan


@dataclass
class _Found:
    """What has been read of a file range or a work unit."""

    digests: bytearray = field(default_factory=bytearray)
    empty: int = 0
    bad: int = 0
    problems: list[Problem] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    fields: Counter[str] = field(default_factory=Counter)
    groups: bytearray = field(default_factory=bytearray)
    signatures: bytearray = field(default_factory=bytearray)
    group_kinds: Counter[str] = field(default_factory=Counter)
    group_names: dict[str, str] = field(default_factory=dict)
    matched: Counter[str] = field(default_factory=Counter)

    def add_group(self, group: Group, num_bytes: int) -> None:
        """Note the group of a document."""
        kind, name, number = group
        self.groups += number.to_bytes(8, "little") + num_bytes.to_bytes(8, "little")
        self.group_kinds[kind] += 1
        if len(self.group_names) < _MOST_NAMED_GROUPS:
            self.group_names.setdefault(str(number), name[:_SHOWN_CHARACTERS])

    def add(self, other: "_Found") -> None:
        """Take in what has been read of another range."""
        self.digests += other.digests
        self.empty += other.empty
        self.bad += other.bad
        self.problems += other.problems
        self.left_out.update(other.left_out)
        self.fields.update(other.fields)
        self.groups += other.groups
        self.signatures += other.signatures
        self.group_kinds.update(other.group_kinds)
        if len(self.group_names) < _MOST_NAMED_GROUPS:
            self.group_names |= other.group_names
        self.matched.update(other.matched)


def _scan_range(job: ScanJob, file_range: FileRange, found: _Found, advance: Advance) -> bool:
    """Read and hash the documents of a file range; False if it cannot be read to its end and is skipped for that."""
    first = None if file_range.is_cut and file_range.begin else 0
    licence_key = job.reader.options.licence_key
    source = job.reader.inputs[file_range.input]
    grouping = None
    if job.split:
        common_folder = job.reader.common_folder_of(file_range)
        grouping = Grouping(source.base, source.source, source.holds_texts, job.split, common_folder, job.is_all)
    for document in job.reader.read(file_range, first, found.left_out, found.matched):
        advance(1)
        if isinstance(document, BadText):
            found.bad += 1
            if document.is_file and job.skip_bad:
                return False
            if not job.skip_bad:
                found.problems.append(document.problem)
            if len(found.problems) >= MAX_LISTED_PROBLEMS:
                break
        elif document.text:
            found.digests += document.sha256
            found.fields.update([*document.fields, *([licence_key] if licence_key and document.licence else [])])
            if grouping:
                found.add_group(grouping.of(document, file_range.name), document.num_bytes)
            if job.with_signatures:
                found.signatures += signature(document.text.encode("utf-8")).tobytes()
        else:
            found.empty += 1
    return True
