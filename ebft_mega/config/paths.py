"""Paths of a configuration: written for people and other machines, absolute in memory. No file is opened.

Every key of the kinds `LocalPath`, `DatasetPlace` and `WordOrPath` (`fields.py`) is one. Home directories and variables
are put in once, when a configuration is loaded, so that the ranks of a job compare what they have become.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebft_mega.errors import Problem
from ebft_mega.io.expanded_paths import REPOSITORY, PathTextError, expanded, written

_ADDRESS = re.compile(r"\w+:")
# What keys that take a word or a path understand as words.
WORDS = ("auto", "never")


class StoredModel(type(Path())):  # type: ignore[misc]
    """A model in a store: the path of its copy on this machine, which remembers the address.

    Until it is known where the copy lies (`data.store.model_copies`), the path leads nowhere.
    """

    address: str = ""
    to_download: str = ""  # in words: what a start downloads; empty where the copy is whole

    @classmethod
    def of(cls, address: str) -> "StoredModel":
        """The model at an address, before there is a copy; its name is that of the model, without a revision."""
        scheme, _, rest = address.rstrip("/").partition("://")
        *folders, name = rest.split("/")
        return cls("/", f"{scheme}:", *folders, name.partition("@")[0]).at(address)

    def at(self, address: str, to_download: str = "") -> "StoredModel":
        """Remember the address of what lies, or will lie, at this path."""
        self.address, self.to_download = address, to_download
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return _stored_model, (str(self), self.address, self.to_download)


def _stored_model(path: str, address: str, to_download: str) -> StoredModel:
    return StoredModel(path).at(address, to_download)


@dataclass(frozen=True)
class PathKind:
    """What a key of a path takes besides it."""

    has_words: bool = False
    default: str | None = None  # the path where the key is not given


def put_in_places(tree: Any, keys: Mapping[str, PathKind], variables: Mapping[str, str]) -> list[Problem]:
    """Make the paths of a configuration absolute: `~` and variables are expanded, relative ones start at the root.

    Addresses and values of other kinds stay as they are; the schema judges them.

    Args:
        tree: sections of keys, as the file has them; it is changed. A path with a problem stays as it is.
        keys: kinds of the dotted keys of paths; `*` stands for every name there.
        variables: the environment.

    Returns:
        What cannot be expanded (`where` is empty).
    """
    problems: list[Problem] = []
    for key, kind in keys.items():
        *parents, leaf = key.split(".")
        for branch, prefix in _branches(tree, parents, ""):
            value = branch.get(leaf, kind.default)
            if not isinstance(value, str) or not value or _ADDRESS.match(value) or (kind.has_words and value in WORDS):
                continue
            try:
                branch[leaf] = os.path.join(REPOSITORY, _expanded_text(value, variables))
            except PathTextError as error:
                problems.append(Problem("", f"{prefix}{leaf}", error.found, error.expected, error.suggestion))
    return problems


def paths_in(tree: Any, keys: Mapping[str, PathKind]) -> Iterator[tuple[str, str]]:
    """List the keys of a configuration that hold absolute paths, with these.

    Args:
        tree, keys: as for `put_in_places`, which has made the paths absolute.
    """
    for key in keys:
        *parents, leaf = key.split(".")
        for branch, prefix in _branches(tree, parents, ""):
            value = branch.get(leaf)
            if isinstance(value, str) and os.path.isabs(value) and "\0" not in value:
                yield f"{prefix}{leaf}", value


def _expanded_text(value: str, variables: Mapping[str, str]) -> str:
    """Expand a path, which a run must be able to write down: a variable may hold any bytes."""
    text = expanded(value, variables)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise PathTextError(f"{value!r}, which is {text!r}", "a path in UTF-8, as configurations are") from None
    return text


def _branches(tree: Any, names: list[str], prefix: str) -> list[tuple[dict[str, Any], str]]:
    """The mappings at a dotted place, and the keys that lead to them; none where there is something else."""
    if not isinstance(tree, dict):
        return []
    if not names:
        return [(tree, prefix)]
    first, *rest = names
    inner = [name for name in tree if first in ("*", name)]
    return [found for name in inner for found in _branches(tree[name], rest, f"{prefix}{name}.")]


def written_path(value: Path | str) -> str:
    """Write a path as a configuration has it: below the repository from its root on, so that a checkout can be moved.

    Addresses and words stay as they are.
    """
    if isinstance(value, StoredModel) and value.address:
        return value.address
    if isinstance(value, str) and (value in WORDS or _ADDRESS.match(value)):
        return value
    path = Path(value)
    text = written(str(path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path))
    return f"./{text}" if text in WORDS or _ADDRESS.match(text) else text
