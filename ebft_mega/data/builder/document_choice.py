"""Which of the scanned documents a build writes, and into which dataset: decided over all work units at once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ebft_mega.data.builder.build_options import BuildOptions
from ebft_mega.data.builder.unit_files import Scan, load_digests, load_groups
from ebft_mega.data.builder.work_plan import Plan
from ebft_mega.data.selection.deduplication import first_occurrences, first_with_text
from ebft_mega.data.selection.held_out_split import (
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
from ebft_mega.data.text.listing import total_counts
from ebft_mega.io.input_errors import bad_input

_FAR = 0.1  # of the share that was asked for: so much more or less is explained


@dataclass(frozen=True)
class Side:
    """The documents of one dataset."""

    folder: str  # below the output; empty where that is the dataset
    keep: list[np.ndarray]  # bool [documents], one for each work unit
    duplicates: int  # documents of its groups that are left out, because an earlier or another one has their text


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

    Memory: about 110 bytes per document.

    Args:
        directory: holds the digests and groups of the scans.
        scans: of all work units.
        options: of the build.
        split: see `split_of`.

    Raises:
        InputError: one side of the split would have no document.
    """
    ends = np.cumsum([scan.documents for scan in scans])

    def by_unit(keep: np.ndarray) -> list[np.ndarray]:
        return np.split(keep, ends[:-1])

    if split is None:
        if not options.deduplicate:
            return DocumentChoice((Side("", [np.ones(scan.documents, bool) for scan in scans], 0),))
        keep = first_occurrences(_joined(directory, scans))
        return DocumentChoice((Side("", by_unit(keep), int((~keep).sum())),))
    first = first_with_text(_joined(directory, scans))
    keep = first == np.arange(len(first)) if options.deduplicate else np.ones(len(first), bool)
    documents = np.concatenate([load_groups(directory, number) for number in range(len(scans))])
    division = divide(documents, keep, split.fraction)
    held_out = division.held_out
    _require_both(division, split, scans)
    on_both = np.zeros(len(first), bool)  # by the number of the first document with the text
    on_both[np.intersect1d(first[held_out], first[~held_out])] = True
    if options.deduplicate:  # the earliest stays, wherever it is
        equal = int((on_both[first] & (held_out != held_out[first])).sum())
    else:  # nothing that is held out is trained on
        keep &= held_out | ~on_both[first]
        equal = int((~keep).sum())
    if not (keep & ~held_out).any():
        found = "for training only texts that are held out, too"
        raise bad_input("--held-out", split.share, found, "documents for both sides")
    sizes = documents["bytes"]
    division = replace(division, bytes=int(sizes[keep].sum()), held_out_bytes=int(sizes[keep & held_out].sum()))
    chosen = "" if options.split and options.split.by else ", as nothing else was said"
    notes = tuple(_split_notes(division, split, chosen, scans, equal))
    sides = tuple(
        Side(folder, by_unit(keep & side), int((side & ~keep).sum()))
        for folder, side in ((TRAIN, ~held_out), (HELD_OUT, held_out))
    )
    record = {
        "asked": split.share,
        "by": split.by,
        "equal_across": equal,
        "groups": division.groups,
        "held_out_groups": division.held_out_groups,
        "named_by": total_counts(scan.group_kinds for scan in scans),
        "seed": split.seed,
        "share": round(division.share, 6),
    }
    return DocumentChoice(sides, notes, record)


def _joined(directory: Path, scans: Sequence[Scan]) -> np.ndarray:
    return np.concatenate([load_digests(directory, number) for number in range(len(scans))])


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
        found = f"a single group{f', {name}' if name else ''} (--split-by {split.by})"
        raise bad_input("--held-out", split.share, found, f"at least two, one for each side{advice}")


def _name_of(number: int, scans: Sequence[Scan]) -> str | None:
    return next((name for scan in scans if (name := scan.group_names.get(str(number)))), None)


def _split_notes(
    division: Division, split: SplitOptions, chosen: str, scans: Sequence[Scan], equal: int
) -> Iterator[str]:
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
    if equal:
        yield f"{equal} documents are left out because the other dataset has their text"
