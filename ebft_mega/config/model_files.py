"""Whether a Hugging Face directory holds all its weights, from file names, sizes and headers: no torch."""

import json
import struct
from pathlib import Path
from typing import Any

from ebft_mega.errors import Problem

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_LENGTH_BYTES = 8  # a safetensors file starts with the length of its JSON header
_WEIGHTS = f"{SINGLE_NAME}, or {INDEX_NAME} and the files it names (other formats can hold code)"


def weight_file_problems(directory: Path) -> list[Problem]:
    """What is missing from, or cut off in, the weights of a model directory.

    Every `*.safetensors` file must be as long as its header says; an index must name files that are there.

    Args:
        directory: a Hugging Face model directory.
    """
    present = sorted(directory.glob("*.safetensors"))
    problems = [problem for path in present for problem in _truncation(path)]
    index = directory / INDEX_NAME
    if index.is_file():
        missing, found = _indexed_files(index)
        problems += found
        problems += [
            Problem(str(directory / name), name, "no such file", f"a file that {INDEX_NAME} names") for name in missing
        ]
    elif not (directory / SINGLE_NAME).is_file():
        others = [path.name for path in present] or sorted(path.name for path in directory.glob("*.bin"))
        problems.append(Problem(str(directory), "weights", ", ".join(others) or "none", _WEIGHTS))
    return problems


def _indexed_files(index: Path) -> tuple[list[str], list[Problem]]:
    """Files that an index names and that are not there, and what is wrong with the index itself."""
    try:
        content: Any = json.loads(index.read_text(encoding="utf-8"))
        names = {str(name) for name in content["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [], [Problem(str(index), "weight_map", repr(error), "a JSON object of tensor and file names")]
    outside = sorted(name for name in names if Path(name).name != name)
    problems = [Problem(str(index), "weight_map", repr(name), "plain file names") for name in outside]
    return sorted(name for name in names.difference(outside) if not (index.parent / name).is_file()), problems


def _truncation(path: Path) -> list[Problem]:
    """A problem if the file is not as long as its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(_LENGTH_BYTES)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == _LENGTH_BYTES else size
        if header_bytes > size - _LENGTH_BYTES:
            return [Problem(str(path), path.name, f"{size} bytes", "a complete safetensors header")]
        text = file.read(header_bytes)
    try:
        header: Any = json.loads(text)
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        return [Problem(str(path), path.name, repr(error), "a safetensors header")]
    expected = _LENGTH_BYTES + header_bytes + end
    return [] if size == expected else [Problem(str(path), path.name, f"{size} bytes", f"{expected} bytes")]
