"""The file that an evaluation leaves. No torch."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ebft_mega.io.durable import write_bytes
from ebft_mega.io.standard_streams import print_line


def write_evaluation(path: Path, content: dict[str, Any]) -> Path:
    """Write the file of an evaluation, whole or not at all; where another one is replaced, a note says so.

    A mean that is not finite becomes null, and a note says what was left out.

    Args:
        content: means under their names, and everything else, whose numbers are finite.
    Returns:
        `path`, whose directory is made if needed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks, rows = (int(content.get(f"eval/{name}_left_out", 0)) for name in ("blocks", "rows"))
    if blocks or rows:
        print(f"note: something was not finite: {blocks} blocks are left out, and the cross-entropy of {rows} rows")
    content = {key: None if _is_not_finite(value) else value for key, value in content.items()}
    lines = ",\n".join(_lines(content))
    text = f"{{\n{lines}\n}}\n".encode()
    earlier = path.read_bytes() if path.is_file() else text
    write_bytes(path, text)
    if earlier == text:
        return path
    try:
        model = json.loads(earlier)["model"]
    except (ValueError, KeyError, TypeError, RecursionError):
        model = "an unknown model"
    print_line(f"note: {path}: the earlier evaluation there, of {model}, is replaced", sys.stdout)
    return path


def _lines(content: dict[str, Any]) -> Iterator[str]:
    """A line for every key, and for every element of a list of objects."""
    for key, value in content.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            elements = ",\n  ".join(json.dumps(element, allow_nan=False) for element in value)
            yield f" {json.dumps(key)}: [\n  {elements}\n ]"
        else:
            yield f" {json.dumps(key)}: {json.dumps(value, allow_nan=False)}"


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
