"""Hold out shares of the documents, whole groups of them: documents of one group lie on one side.

Documents of one folder or repository quote and repeat each other, so a model that has seen some of them is not tested
by the others.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ebft_mega.data.text.document_groups import DOCUMENT, REPOSITORY, REPOSITORY_KEYS, TOP_FOLDER
from ebft_mega.data.text.source_archives import member_path
from ebft_mega.data.text.text_files import TextDocument

TRAIN, HELD_OUT = "train", "held-out"  # folders of the output
_PART_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
_MOST_SHARE = 20  # characters, and places after the point
GROUP_DTYPE = np.dtype([("group", "<u8"), ("bytes", "<u8")])  # of a document: its group's number, the text's size
ARCHIVE, ARCHIVE_FOLDER = "archive", "folder of the archive"  # what names a group, beside folders and members
REPOSITORY_FOLDER = ".git"  # a folder, or a file in a submodule


@dataclass(frozen=True)
class SplitOptions:
    """What is held out, and what is a group."""

    # Of the bytes of text: a percentage, such as 1%, or a fraction, such as 0.01; or several with the names of their
    # datasets, such as tuning=5%,report=10%.
    share: str
    # `top-folder`, `repo`, `document`, or a member of the documents' records. None: see `usual_groups`.
    by: str | None = None
    seed: int = 0  # of the choice of groups

    @property
    def shares(self) -> dict[str, Fraction]:
        """The share of each held-out dataset, by its folder in the output."""
        return read_shares(self.share)

    @property
    def key(self) -> str | None:
        """The member of records that names a document's group; None where something else does."""
        return None if self.by in (None, TOP_FOLDER, REPOSITORY, DOCUMENT) else self.by

    @property
    def keys(self) -> tuple[str, ...]:
        """Members of records of which the first that is there names a document's group."""
        if self.by == REPOSITORY:
            return REPOSITORY_KEYS
        return (self.key,) if self.key else ()


def read_share(text: str) -> Fraction:
    """A share that is written as a percentage or a fraction, exactly.

    Raises:
        ValueError: it is neither, or is not between 0 and 1.
    """
    number = text.strip()
    try:
        value = Decimal(number.removesuffix("%").strip())
    except InvalidOperation:
        raise ValueError("no number") from None
    # As a fraction, 1e-999999999 has a billion digits.
    if not value.is_finite() or len(number) > _MOST_SHARE or not -_MOST_SHARE < value.adjusted() <= 2:
        raise ValueError("not between 0 and 100 %")
    share = Fraction(value) / (100 if number.endswith("%") else 1)
    if not 0 < share < 1:
        raise ValueError("not between 0 and 100 %")
    return share


def read_shares(text: str) -> dict[str, Fraction]:
    """A share of the one held-out dataset, or NAME=SHARE,NAME=SHARE for several: shares by folder of the output.

    Raises:
        ValueError: it is neither, a share is none (see `read_share`), a name is wrong or given twice, or nothing would
            be left to train on; the message says it.
    """
    if "=" not in text:
        return {HELD_OUT: read_share(text)}
    shares: dict[str, Fraction] = {}
    for part in text.split(","):
        name, has_share, share = (word.strip() for word in part.partition("="))
        if not has_share or not _PART_NAME.fullmatch(name) or name.lower() == TRAIN or name in shares:
            raise ValueError(f"{part.strip()!r} is no NAME=SHARE with a name of its own")
        shares[name] = read_share(share)
    if sum(shares.values()) >= 1:
        raise ValueError("nothing is left to train on")
    return shares


def usual_groups(files: Sequence[tuple[str, bool]]) -> str:
    """What is a group where nothing was said: the top folders of folders of texts, else single documents.

    Args:
        files: of each file that is read its path below its input, and whether it is one text.
    """
    tops = {name.partition("/")[0] for name, _ in files if "/" in name}
    return TOP_FOLDER if len(tops) > 1 and all(is_text for _, is_text in files) else DOCUMENT


def group_number(name: str, seed: int) -> int:
    """A group's place in the order in which groups are held out: 64 bits of a hash of its name and the seed.

    Two groups with one number are one group, which divides neither.
    """
    key = seed.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8, key=key).digest())


def top_folder(path: str) -> str:
    """The first folder of a path below an input; a file that lies directly below it stands for itself."""
    return path.partition("/")[0]


def repository_folder(base: Path, path: str, known: dict[str, str | None]) -> str | None:
    """The nearest folder above a file, at most the input itself, that holds `.git`; None where there is none.

    Args:
        base: the input.
        path: of the file, relative to it.
        known: folders that were looked at, with the answer; it is added to.

    Returns:
        The folder's path relative to the input; `.` for the input itself.
    """
    folder = path.rpartition("/")[0]
    passed = []
    while folder not in known:
        passed.append(folder)
        if (base / folder / REPOSITORY_FOLDER).exists():
            known[folder] = folder or "."
        elif not folder:
            known[folder] = None
        else:
            folder = folder.rpartition("/")[0]
    for each in passed:
        known[each] = known[folder]
    return known[folder]


class Group(NamedTuple):
    """Of a document."""

    kind: str  # what names it: a member of records, ...
    name: str
    number: int  # see `group_number`


class Grouping:
    """The groups of the documents of one input.

    Args:
        base: what the paths of its files are relative to.
        source: name of the input. Inputs of one name have their groups in common.
        holds_texts: whether each of its files is a text.
        split: says what a group is; `by` is set.
        common_folder: of an input whose files hold a document in each member: finds the folder that all of a file lies
            in (`TextFormat.common_folder`).
        is_all: whether one file is all that the build reads; an archive is then divided by its own folders.
    """

    def __init__(
        self,
        base: Path,
        source: str,
        holds_texts: bool,
        split: SplitOptions,
        common_folder: Callable[[Path], str] | None = None,
        is_all: bool = False,
    ):
        self._base = base
        self._source = source
        self._holds_texts = holds_texts
        self._split = split
        self._common_folder = common_folder
        self._is_all = is_all
        self._common: str | None = None  # folder of the archive that all of it lies in
        self._repositories: dict[str, str | None] = {}
        self._last = Group("", "", 0)  # documents of one group follow each other

    def of(self, document: TextDocument, file: str) -> Group:
        """The group of a document of a file, whose path is relative to the input."""
        kind, name = self._named(document, file)
        if (kind, name) != self._last[:2]:
            self._last = Group(kind, name, group_number(name, self._split.seed))
        return self._last

    def _named(self, document: TextDocument, file: str) -> tuple[str, str]:
        if self._split.by == DOCUMENT:
            return DOCUMENT, document.sha256.hex()
        if document.group:
            return document.group
        if self._split.by == REPOSITORY and self._holds_texts:
            folder = repository_folder(self._base, file, self._repositories)
            if folder is not None:
                return REPOSITORY_FOLDER, f"{self._source}/{folder}"
        if self._common_folder and self._split.by == REPOSITORY:
            return ARCHIVE, f"{self._source}/{file}"
        if self._common_folder and self._is_all:
            folder = self._folder_within(document, file, self._common_folder)
            return ARCHIVE_FOLDER, f"{self._source}/{file}/{folder}"
        return TOP_FOLDER, f"{self._source}/{top_folder(file)}"

    def _folder_within(self, document: TextDocument, file: str, common_folder: Callable[[Path], str]) -> str:
        """The first folder of a document of an archive, or its name, below what all of the archive lies in."""
        if self._common is None:
            self._common = common_folder(self._base / file)
        member = member_path(document.path.removeprefix(f"{file}/"))
        return top_folder(member.removeprefix(f"{self._common}/"))


@dataclass(frozen=True)
class Division:
    """Which documents are held out."""

    held_out: np.ndarray  # bool [documents]
    groups: int  # that hold a document which stays
    held_out_groups: int
    bytes: int  # of the texts that stay
    held_out_bytes: int
    largest_group: int  # its number; the largest by the bytes that stay
    largest_bytes: int

    @property
    def share(self) -> float:
        """That is held out, of the bytes of text."""
        return self.held_out_bytes / max(1, self.bytes)


def divide(documents: np.ndarray, keep: np.ndarray, share: Fraction) -> Division:
    """Choose the groups that are held out, by their numbers alone: neither order nor processes change the choice.

    Groups are taken in the order of their numbers, a group that would exceed the share is passed over, and last the
    smallest group that is left is taken if the share is then met more closely, or if there was none.

    Memory: about 60 bytes per document.

    Args:
        documents: GROUP_DTYPE [documents].
        keep: bool [documents]; others count nowhere, but lie on the side of their group.
        share: of the bytes of the documents that stay.
    """
    numbers, member = np.unique(documents["group"], return_inverse=True)
    member = member.reshape(-1)
    sizes = np.zeros(len(numbers), np.int64)
    np.add.at(sizes, member[keep], documents["bytes"][keep].astype(np.int64))
    present = np.zeros(len(numbers), bool)
    present[member[keep]] = True
    total = int(sizes.sum())
    target = share * total
    chosen = np.zeros(len(numbers), bool)
    places = np.flatnonzero(present)
    reached, smallest = 0, int(sizes[places].min()) if len(places) else 0
    for place in places:
        size = int(sizes[place])
        if reached + size <= target:
            chosen[place] = True
            reached += size
        if reached + smallest > target:
            break
    left = places[~chosen[places]]
    if len(left) > 1 or (len(left) and not reached):  # one stays in any case, if there are two
        nearest = left[np.argmin(sizes[left])]  # the first of equal ones
        more = reached + int(sizes[nearest])
        if not reached or abs(more - target) < abs(reached - target):
            chosen[nearest] = True
            reached = more
    largest = int(np.argmax(sizes)) if len(sizes) else 0
    return Division(
        held_out=chosen[member],
        groups=len(places),
        held_out_groups=int(chosen.sum()),
        bytes=total,
        held_out_bytes=reached,
        largest_group=int(numbers[largest]) if len(numbers) else 0,
        largest_bytes=int(sizes[largest]) if len(sizes) else 0,
    )


def divide_among(documents: np.ndarray, keep: np.ndarray, shares: Sequence[Fraction]) -> list[Division]:
    """Choose the groups of several held-out datasets: of the first, then of the second from what is left, and so on.

    Args:
        documents, keep: see `divide`.
        shares: of each dataset, of the bytes of all documents that stay.

    Returns:
        The division of each: no document is held out for two. `groups`, `bytes` and the largest group are those of all
        documents that stay.
    """
    first = divide(documents, keep, shares[0])
    divisions, taken = [first], first.held_out
    for share in shares[1:]:
        left = keep & ~taken
        remaining = int(documents["bytes"][left].sum())
        division = divide(documents, left, min(Fraction(1), share * first.bytes / max(1, remaining)))
        held_out = division.held_out & ~taken
        divisions.append(
            replace(
                first,
                held_out=held_out,
                held_out_groups=division.held_out_groups,
                held_out_bytes=division.held_out_bytes,
            )
        )
        taken = taken | held_out
    return divisions
