"""Which group of documents a record names: its repository, say. A split into train and held-out divides no group."""

import difflib
from collections.abc import Mapping, Sequence

GROUPS = TOP_FOLDER, REPOSITORY, DOCUMENT = "top-folder", "repo", "document"
# Members of records that name a repository, the first that a record has: of the usual collections of code.
REPOSITORY_KEYS = (
    *("repo", "repo_name", "repository", "repository_name", "max_stars_repo_name", "max_issues_repo_name"),
    *("max_forks_repo_name", "repo_full_name", "full_name", "repo_id", "repo_url", "repository_url"),
)
_LONGEST_KEY = 100  # of those that a wrong one is compared with


def group_of_record(record: Mapping[str, object], keys: Sequence[str]) -> tuple[str, str] | str:
    """The first of some members that a record has as a text or a whole number, and what it says.

    Args:
        record: of a document.
        keys: of the members.

    Returns:
        Key and text; or, where there is no such member, words about what there is.
    """
    for key in keys:
        value = record.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if isinstance(value, str) and value:
            return key, value
    there = [f"{key!r}, {_kind(record[key])}" for key in keys if key in record]
    return ", ".join(there) or (f"the keys {', '.join(sorted(record))}" if record else "a document without a record")


def wanted_keys(keys: Sequence[str]) -> str:
    """What is expected where `group_of_record` finds no group."""
    return f"the key {' or '.join(map(repr, keys))}, a text or a whole number"


def nearest_group(word: str, keys: Sequence[str] = ()) -> str:
    """What a person may have meant who says a word of `--split-by` that is none; empty where nothing is near.

    Args:
        word: as it was given.
        keys: of the record.
    """
    names = [*(key for key in keys if len(key) < _LONGEST_KEY), *GROUPS]
    near = difflib.get_close_matches(word.replace("_", "-"), names, 1) or difflib.get_close_matches(word, names, 1)
    return REPOSITORY if word in REPOSITORY_KEYS else "".join(near)


def _kind(value: object) -> str:
    return "an empty text" if value == "" else f"a JSON {type(value).__name__}"
