"""Parse JSON text of which every reader makes the same: no key twice, no NaN, no byte order mark."""

import json
from typing import Any


def parse_json(text: str) -> Any:
    """Parse JSON that leaves no choice to its reader.

    Raises:
        json.JSONDecodeError: it is not JSON.
        ValueError: an object has a key more than once, or a number is NaN or infinite.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_with_single_keys, parse_constant=_refuse_constant)


def _with_single_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are all different; of equal ones, readers would take different values."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {repeated!r} more than once")
    return values


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name}, which is not JSON")
