"""Read what a run has written: JSON files, the good lines of JSON-lines files, and one curve per metric."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ebft_mega.io.input_errors import bad_input, read_input_bytes
from ebft_mega.io.parse_boundary import reading
from ebft_mega.io.records import LARGEST_COUNT

# Steps and values of one key, in step order.
Curve = tuple[list[int], list[float]]


def read_good_lines(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Read the objects with a step of a JSON-lines file, whatever else is in it.

    Returns:
        The objects in file order, and what was left out, in words.
    """
    if not path.is_file():
        return [], []
    lines = path.read_bytes().splitlines()
    records = [record for line in lines if (record := _record(line)) is not None]
    lacking = len(lines) - len(records)
    return records, [f"{path.name}: {lacking} lines that are damaged are left out"] * bool(lacking)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_record = isinstance(record, dict) and type(record.get("step")) is int and abs(record["step"]) <= LARGEST_COUNT
    return record if is_record else None


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object from a file.

    Raises:
        InputError: no such file, or not a JSON object.
    """
    text = read_input_bytes(path, "a JSON file")
    with reading(path, "file", "a JSON object"):
        content = json.loads(text)
    if not isinstance(content, dict):
        raise bad_input(path, "file", type(content).__name__, "a JSON object")
    return content


def curves(records: Iterable[dict[str, Any]]) -> dict[str, Curve]:
    """Turn metric records into one curve per key.

    Several records of one step are merged, the later value wins; null (a value that was not finite) leaves a
    gap.

    Args:
        records: objects with `step` and scalars.
    """
    by_key: dict[str, dict[int, float]] = {}
    for record in records:
        for key, value in record.items():
            if key != "step" and (type(value) is float or (type(value) is int and abs(value) <= LARGEST_COUNT)):
                by_key.setdefault(key, {})[int(record["step"])] = float(value)
    return {
        key: ([step for step, _ in sorted(points.items())], [value for _, value in sorted(points.items())])
        for key, points in by_key.items()
    }
