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
    REPOSITORY,
    REPOSITORY_FOLDER,
    TOP_FOLDER,
    TRAIN,
    Division,
    SplitOptions,
    divide_among,
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
        InputError: a side of the split would have no document.
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
    """The sides of the documents that stay, and what is said about them."""
    documents = np.concatenate([load_groups(directory, number) for number in range(len(scans))])
    folders = [TRAIN, *split.shares]
    divisions = divide_among(documents, keep, list(split.shares.values()))
    _require_all(divisions, split, scans)
    side = np.zeros(len(keep), np.int16)  # of each document: its number in `folders`
    for number, division in enumerate(divisions, 1):
        side[division.held_out] = number
    keep, equal = _on_one_side(first, keep, side, options.deduplicate)
    if not all((keep & (side == number)).any() for number in range(len(folders))):
        found = "for training only texts that are held out, too" if len(folders) == 2 else "texts for too few datasets"
        raise bad_input("--held-out", split.share, found, f"documents for {_in_all(folders)}")
    sizes = documents["bytes"]
    divisions = [
        replace(each, bytes=int(sizes[keep].sum()), held_out_bytes=int(sizes[keep & each.held_out].sum()))
        for each in divisions
    ]
    candidates = keep & signatures.any(axis=1)
    across = sum(
        int(near_across(signatures, candidates & (side <= number), side == number, ACROSS_THRESHOLD).sum())
        for number in range(1, len(folders))
    )
    chosen = "" if options.split and options.split.by else ", as nothing else was said"
    notes = [
        *(_share_note(*each, split, chosen, scans) for each in zip(folders[1:], divisions, strict=True)),
        *_kinds_notes(split, scans),
        *_across_notes(equal, across, len(folders)),
    ]
    held_out_bytes = sum(each.held_out_bytes for each in divisions)
    record = {
        "asked": split.share,
        "by": split.by,
        "equal_across": equal,
        "groups": divisions[0].groups,
        "held_out_groups": sum(each.held_out_groups for each in divisions),
        "named_by": total_counts(scan.group_kinds for scan in scans),
        "near_across": across,
        "seed": split.seed,
        "share": round(held_out_bytes / max(1, divisions[0].bytes), 6),
    }
    sides = tuple(_side(folder, side == number, keep, near, scans) for number, folder in enumerate(folders))
    return DocumentChoice(sides, tuple(notes), record)


def _on_one_side(first: np.ndarray, keep: np.ndarray, side: np.ndarray, deduplicate: bool) -> tuple[np.ndarray, int]:
    """Leave no text on two sides.

    Args:
        first: int64 [documents], of each the first that has its text.
        keep: bool [documents], those that stay so far.
        side: int16 [documents], their sides.
        deduplicate: whether `keep` has left out all but the first already.

    Returns:
        Those that stay, bool [documents], and how many are left out because another side has their text.
    """
    if deduplicate:  # the earliest stays, wherever it is
        return keep, int((side != side[first]).sum())
    # Nothing that is held out is trained on, nor in an earlier one of several held-out datasets.
    last = np.zeros(len(first), np.int16)  # side of a text, by the number of the first document that has it
    np.maximum.at(last, first[keep], side[keep])
    out = keep & (side < last[first])
    return keep & ~out, int(out.sum())


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


def _in_all(folders: Sequence[str]) -> str:
    return "both sides" if len(folders) == 2 else f"{', '.join(folders[:-1])} and {folders[-1]}"


def _require_all(divisions: Sequence[Division], split: SplitOptions, scans: Sequence[Scan]) -> None:
    """Check that there is a group for each side, and something that the groups are named by.

    Raises:
        InputError: there is not.
    """
    kinds = total_counts(scan.group_kinds for scan in scans)
    if split.by == REPOSITORY and not kinds.keys() - {TOP_FOLDER}:
        found = f"no folder with {REPOSITORY_FOLDER}, and no record that names a repository"
        raise bad_input("--split-by", REPOSITORY, found, "repositories, or --split-by top-folder, document or a key")
    groups, held_out = divisions[0].groups, [each.held_out_groups for each in divisions]
    if groups < 2 or not all(held_out) or sum(held_out) == groups:
        name = _name_of(divisions[0].largest_group, scans)
        advice = "" if split.by == DOCUMENT else "; --split-by document makes each document one"
        if kinds.keys() == {ARCHIVE}:
            advice += ", top-folder the folders of an archive"
        if groups < 2:
            found = f"a single group{f', {name}' if name else ''} (--split-by {split.by})"
        else:
            found = f"{groups} groups (--split-by {split.by}), which leave a dataset without any"
        expected = "at least two, one for each side" if len(divisions) == 1 else "several for each dataset"
        raise bad_input("--held-out", split.share, found, f"{expected}{advice}")


def _name_of(number: int, scans: Sequence[Scan]) -> str | None:
    return next((name for scan in scans if (name := scan.group_names.get(str(number)))), None)


def _share_note(folder: str, division: Division, split: SplitOptions, chosen: str, scans: Sequence[Scan]) -> str:
    """What a held-out dataset has come to, in a sentence."""
    asked = float(split.shares[folder])
    line = (
        f"{folder.replace('held-out', 'held out')}: {division.held_out_groups} of {division.groups} groups "
        f"(--split-by {split.by}{chosen}), "
        f"{100 * division.share:.3g} % of the bytes of text where {100 * asked:.3g} % were asked for"
    )
    if abs(division.share - asked) > _FAR * asked:
        name = _name_of(division.largest_group, scans)
        largest = 100 * division.largest_bytes / division.bytes
        line += f"; no group is divided, and the largest{f', {name},' if name else ''} has {largest:.3g} %"
    return line


def _kinds_notes(split: SplitOptions, scans: Sequence[Scan]) -> Iterator[str]:
    """What the groups are named by, where that is not one thing."""
    kinds = total_counts(scan.group_kinds for scan in scans)
    if len(kinds) > 1 or split.by == REPOSITORY:
        counts = ", ".join(f"{kind} of {count} documents" for kind, count in sorted(kinds.items()))
        yield f"what names the groups: {counts}"


def _across_notes(equal: int, near: int, sides: int) -> Iterator[str]:
    """What the sides have in common."""
    if equal:
        other = "the other" if sides == 2 else "another"
        yield f"{equal} documents are left out because {other} dataset has their text"
    if near:
        other = "for training" if sides == 2 else "for training or in a held-out dataset before theirs"
        yield (
            f"{near} documents that are held out are nearly the same as one {other} (Jaccard index from "
            f"{ACROSS_THRESHOLD}); --near-deduplicate {ACROSS_THRESHOLD} leaves near-duplicates out"
        )
