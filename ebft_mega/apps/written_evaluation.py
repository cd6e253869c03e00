"""The file that an evaluation leaves. No torch."""

import json
from pathlib import Path
from typing import Any

from ebft_mega.io.durable import write_bytes


def write_evaluation(path: Path, content: dict[str, Any]) -> Path:
    """Write the file of an evaluation, whole or not at all; where another one is replaced, a note says so.

    Args:
        content: of finite numbers and None, since JSON has no others.
    Returns:
        `path`, whose directory is made if needed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()
    earlier = path.read_bytes() if path.is_file() else text
    write_bytes(path, text)
    if earlier == text:
        return path
    try:
        model = json.loads(earlier)["model"]
    except (ValueError, KeyError, TypeError, RecursionError):
        model = "an unknown model"
    print(f"note: {path}: the earlier evaluation there, of {model}, is replaced")
    return path
