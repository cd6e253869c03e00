"""Which group of documents a record names: its repository, say. A split into train and held-out divides no group."""

from collections.abc import Mapping, Sequence


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


def _kind(value: object) -> str:
    return "an empty text" if value == "" else f"a JSON {type(value).__name__}"
