"""Which of the scanned documents a build writes, and into which dataset: decided over all work units at once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ebft_mega.data.builder.array_files import write_array
from ebft_mega.data.builder.build_options import BuildOptions
from ebft_mega.data.builder.unit_files import Scan, load_digests, load_groups, load_signatures
from ebft_mega.data.builder.work_plan import Plan
from ebft_mega.data.selection.deduplication import first_with_text
from ebft_mega.data.selection.held_out_split import (
    ARCHIVE,
    DOCUMENT,
    HELD_OUT,
    REPOSITORY,
    REPOSITORY_FOLDER,
    TOP_FOLDER,
    TRAIN,
    Division,
    SplitOptions,
    divide,
    usual_groups,
)
from ebft_mega.data.selection.near_duplicates import ACROSS_THRESHOLD, PLACES, near_across, near_duplicates
from ebft_mega.data.text.listing import total_counts
from ebft_mega.io.input_errors import bad_input
from ebft_mega.io.parse_boundary import reading

_FAR = 0.1  # of the share that was asked for: so much more or less is explained


@dataclass(frozen=True)
class Side:
    """The documents of one dataset."""

    folder: str  # below the output; empty where that is the dataset
    keep: list[np.ndarray]  # bool [documents], one for each work unit
    duplicates: int  # documents of its groups that are left out, because another one has their text
    near_duplicates: int  # that are left out, because an earlier one is nearly the same


@dataclass(frozen=True)
class DocumentChoice:
    """Of all documents."""

    sides: tuple[Side, ...]
    notes: tuple[str, ...] = ()
    split: dict[str, Any] = field(default_factory=dict)  # `BuildRecord.split`


def split_of(plan: Plan, options: BuildOptions) -> SplitOptions | None:
    """What is held out, with what a group is where nobody has said it."""
    split = options.split
    if split is None or split.by is not None:
        return split
    inputs = plan.reader.inputs
    files = [
        (file_range.name, inputs[file_range.input].holds_texts)
        for work_unit in plan.work_units
        for file_range in work_unit
    ]
    return replace(split, by=usual_groups(files))


def choose_documents(
    directory: Path, scans: Sequence[Scan], options: BuildOptions, split: SplitOptions | None
) -> DocumentChoice:
    """Choose over all work units.

    Memory: about 110 bytes per document; with near-duplicates at most 850, of which 512 are mapped from a file.

    Args:
        directory: holds the digests, groups and signatures of the scans.
        scans: of all work units.
        options: of the build.
        split: see `split_of`.

    Raises:
        InputError: one side of the split would have no document.
    """
    total = sum(scan.documents for scan in scans)
    if not options.deduplicate and not split:
        first = np.arange(total)
    else:
        first = first_with_text(np.concatenate([load_digests(directory, number) for number in range(len(scans))]))
    keep = first == np.arange(total) if options.deduplicate else np.ones(total, bool)
    with _signatures(directory, scans, needs_signatures(options)) as signatures:
        near = np.zeros(total, bool)
        if options.near_deduplicate is not None:
            candidates = keep & signatures.any(axis=1)
            near = near_duplicates(signatures, candidates, options.near_deduplicate)
            keep &= ~near
        if split is None:
            return DocumentChoice((_side("", np.ones(total, bool), keep, near, scans),))
        return _divided(directory, scans, options, split, first, keep, near, signatures)


def needs_signatures(options: BuildOptions) -> bool:
    """Whether documents are compared by their signatures."""
    return options.near_deduplicate is not None or options.split is not None


def _divided(
    directory: Path,
    scans: Sequence[Scan],
    options: BuildOptions,
    split: SplitOptions,
    first: np.ndarray,
    keep: np.ndarray,
    near: np.ndarray,
    signatures: np.ndarray,
) -> DocumentChoice:
    """Two sides of the documents that stay, and what is said about them."""
    documents = np.concatenate([load_groups(directory, number) for number in range(len(scans))])
    division = divide(documents, keep, split.fraction)
    held_out = division.held_out
    _require_both(division, split, scans)
    if options.deduplicate:  # the earliest stays, wherever it is
        equal = int((held_out != held_out[first]).sum())
    else:  # nothing that is held out is trained on
        is_held_out = np.zeros(len(first), bool)  # of a text, by the number of the first document that has it
        is_held_out[first[keep & held_out]] = True
        out = keep & ~held_out & is_held_out[first]
        keep = keep & ~out
        equal = int(out.sum())
    if not (keep & ~held_out).any():
        found = "for training only texts that are held out, too"
        raise bad_input("--held-out", split.share, found, "documents for both sides")
    sizes = documents["bytes"]
    division = replace(division, bytes=int(sizes[keep].sum()), held_out_bytes=int(sizes[keep & held_out].sum()))
    candidates = keep & signatures.any(axis=1)
    across = int(near_across(signatures, candidates, held_out, ACROSS_THRESHOLD).sum())
    chosen = "" if options.split and options.split.by else ", as nothing else was said"
    notes = [*_split_notes(division, split, chosen, scans), *_across_notes(equal, across)]
    record = {
        "asked": split.share,
        "by": split.by,
        "equal_across": equal,
        "groups": division.groups,
        "held_out_groups": division.held_out_groups,
        "named_by": total_counts(scan.group_kinds for scan in scans),
        "near_across": across,
        "seed": split.seed,
        "share": round(division.share, 6),
    }
    sides = (_side(TRAIN, ~held_out, keep, near, scans), _side(HELD_OUT, held_out, keep, near, scans))
    return DocumentChoice(sides, tuple(notes), record)


def _side(folder: str, members: np.ndarray, keep: np.ndarray, near: np.ndarray, scans: Sequence[Scan]) -> Side:
    ends = np.cumsum([scan.documents for scan in scans])[:-1]
    out = members & ~keep
    return Side(folder, np.split(keep & members, ends), int((out & ~near).sum()), int((out & near).sum()))


@contextmanager
def _signatures(directory: Path, scans: Sequence[Scan], wanted: bool) -> Iterator[np.ndarray]:
    """Signatures of all documents: uint16 [documents, PLACES], memory-mapped from a file that is removed again."""
    if not wanted:
        yield np.empty((0, PLACES), np.uint16)
        return
    path = directory / "signatures.npy"
    shape = (sum(scan.documents for scan in scans), PLACES)
    parts = (load_signatures(directory, number) for number in range(len(scans)))
    write_array(path, np.dtype(np.uint16), shape, parts)
    try:
        with reading(path, path.name, "what has just been written"):
            signatures = np.load(path, mmap_mode="r", allow_pickle=False)
        yield signatures
    finally:
        path.unlink()


def _require_both(division: Division, split: SplitOptions, scans: Sequence[Scan]) -> None:
    """Check that there is a group for each side, and something that the groups are named by.

    Raises:
        InputError: there is not.
    """
    kinds = total_counts(scan.group_kinds for scan in scans)
    if split.by == REPOSITORY and not kinds.keys() - {TOP_FOLDER}:
        found = f"no folder with {REPOSITORY_FOLDER}, and no record that names a repository"
        raise bad_input("--split-by", REPOSITORY, found, "repositories, or --split-by top-folder, document or a key")
    if division.groups < 2:
        name = _name_of(division.largest_group, scans)
        advice = "" if split.by == DOCUMENT else "; --split-by document makes each document one"
        if kinds.keys() == {ARCHIVE}:
            advice += ", top-folder the folders of an archive"
        found = f"a single group{f', {name}' if name else ''} (--split-by {split.by})"
        raise bad_input("--held-out", split.share, found, f"at least two, one for each side{advice}")


def _name_of(number: int, scans: Sequence[Scan]) -> str | None:
    return next((name for scan in scans if (name := scan.group_names.get(str(number)))), None)


def _split_notes(division: Division, split: SplitOptions, chosen: str, scans: Sequence[Scan]) -> Iterator[str]:
    """What the split has come to, one sentence each."""
    asked = float(split.fraction)
    line = (
        f"held out: {division.held_out_groups} of {division.groups} groups (--split-by {split.by}{chosen}), "
        f"{100 * division.share:.3g} % of the bytes of text where {100 * asked:.3g} % were asked for"
    )
    if abs(division.share - asked) > _FAR * asked:
        name = _name_of(division.largest_group, scans)
        largest = 100 * division.largest_bytes / division.bytes
        line += f"; no group is divided, and the largest{f', {name},' if name else ''} has {largest:.3g} %"
    yield line
    kinds = total_counts(scan.group_kinds for scan in scans)
    if len(kinds) > 1 or split.by == REPOSITORY:
        counts = ", ".join(f"{kind} of {count} documents" for kind, count in sorted(kinds.items()))
        yield f"what names the groups: {counts}"


def _across_notes(equal: int, near: int) -> Iterator[str]:
    """What the two sides have in common."""
    if equal:
        yield f"{equal} documents are left out because the other dataset has their text"
    if near:
        yield (
            f"{near} documents that are held out are nearly the same as one for training (Jaccard index from "
            f"{ACROSS_THRESHOLD}); --near-deduplicate {ACROSS_THRESHOLD} leaves near-duplicates out"
        )
