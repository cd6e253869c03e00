"""List the tensors of a Hugging Face directory from file names, sizes and headers: no torch, nothing is unpickled."""

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebft_mega.errors import InputError, Problem
from ebft_mega.io.contained_files import read_contained_json
from ebft_mega.io.input_errors import NO_FILE, file_obstacle, lfs_pointer
from ebft_mega.io.json_text import parse_json
from ebft_mega.io.parse_boundary import words_of

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DTYPE_BYTES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1},
}
_POINTER_BYTES = 32  # enough to tell the stand-in of a repository with large files
_LENGTH_BYTES = 8  # a safetensors file starts with the length of its JSON header
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_WEIGHTS = f"{SINGLE_NAME}, or {INDEX_NAME} and the files it names (other formats can hold code)"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of its file announces it."""

    file: Path
    dtype: str  # in the format's spelling: F32, BF16, ...
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file


def stored_tensors(directory: Path) -> tuple[dict[str, StoredTensor], list[Problem]]:
    """The tensors of a model directory, by name.

    Every `*.safetensors` file that is part of the model must be as long as its header says and have its tensors side
    by side; an index must name files that are there, and exactly the tensors that they hold.

    Args:
        directory: a Hugging Face model directory.
    Returns:
        The tensors of all files that can be read, and everything that is wrong.
    """
    names, problems = _weight_files(directory)
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        for tensor, stored in _read_header(directory / name, problems).items():
            if tensor in tensors:
                found = f"in {tensors[tensor].file.name} and in {name}"
                problems.append(Problem(str(directory), tensor, found, "one tensor of a name"))
            tensors[tensor] = stored
    if not problems and (directory / INDEX_NAME).is_file():
        problems += _index_differs(directory / INDEX_NAME, tensors)
    return tensors, problems


def _weight_files(directory: Path) -> tuple[list[str], list[Problem]]:
    """Names of the files with weights, and what is wrong with their choice."""
    index = directory / INDEX_NAME
    obstacles = {name: file_obstacle(directory / name) for name in (SINGLE_NAME, INDEX_NAME)}
    strange = {name: found for name, found in obstacles.items() if found not in (None, NO_FILE)}
    if strange:
        return [], [Problem(str(directory / name), name, str(found), "a file") for name, found in strange.items()]
    is_single = obstacles[SINGLE_NAME] is None
    if obstacles[INDEX_NAME] is not None:
        if is_single:
            return [SINGLE_NAME], []
        patterns = ("*.safetensors", "*.bin", "*.gguf")
        others = next((names for pattern in patterns if (names := _names(directory.glob(pattern)))), [])
        return [], [Problem(str(directory), "weights", ", ".join(others) or "none", _WEIGHTS)]
    weight_map, problems = _read_index(index)
    names = sorted(set(weight_map.values()))
    if is_single and SINGLE_NAME not in names:
        # transformers takes the one and others the other.
        problems.append(Problem(str(directory), "weights", f"{SINGLE_NAME} beside {INDEX_NAME}", "one of the two"))
    outside = [name for name in names if not _is_plain(name)]
    problems += [Problem(str(index), "weight_map", repr(name), "plain file names") for name in outside]
    found = {name: file_obstacle(directory / name) for name in names if name not in outside}
    problems += [
        Problem(str(directory / name), name, obstacle, f"a file that {INDEX_NAME} names")
        for name, obstacle in found.items()
        if obstacle is not None
    ]
    return [name for name, obstacle in found.items() if obstacle is None], problems


def _names(paths: Iterable[Path]) -> list[str]:
    return sorted(path.name for path in paths)


def _is_plain(name: str) -> bool:
    return Path(name).name == name and name.endswith(".safetensors")


def _read_index(index: Path) -> tuple[dict[str, str], list[Problem]]:
    """The file of each tensor, as the index has it."""
    expected = "a JSON object of tensor and file names"
    try:
        weight_map = read_contained_json(index.parent, index.name, expected).get("weight_map")
    except InputError as error:
        return {}, list(error.problems)
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        return {}, [Problem(str(index), "weight_map", repr(weight_map)[:200], expected)]
    return weight_map, []


def _index_differs(index: Path, tensors: dict[str, StoredTensor]) -> list[Problem]:
    """Tensors that are not where the index says, and tensors of its files that it does not name."""
    weight_map, problems = _read_index(index)
    for tensor in sorted(weight_map.keys() | tensors.keys()):
        named = weight_map.get(tensor)
        held = tensors[tensor].file.name if tensor in tensors else None
        if named != held:
            problems.append(Problem(str(index), tensor, f"in {named or 'no file'}", f"in {held or 'no file'}"))
    return problems


def _read_header(path: Path, problems: list[Problem]) -> dict[str, StoredTensor]:
    """The tensors that a file announces; nothing after a problem was added."""

    def refuse(found: str, expected: str, key: str = path.name) -> dict[str, StoredTensor]:
        problems.append(Problem(str(path), key, found, expected))
        return {}

    if (obstacle := file_obstacle(path)) is not None:
        return refuse(obstacle, "a safetensors file")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(_LENGTH_BYTES)
            if (pointer := lfs_pointer(prefix + file.read(_POINTER_BYTES))) is not None:
                return refuse(pointer, "a safetensors file")
            file.seek(len(prefix))
            header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == _LENGTH_BYTES else size
            if header_bytes > min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
                return refuse(f"{size} bytes", "a complete safetensors header")
            text = file.read(header_bytes)
    except OSError as error:
        return refuse(words_of(error), "a safetensors file")
    try:
        entries: Any = parse_json(text.decode("utf-8"))
        entries.pop("__metadata__", None)
        spans = {name: _pair(entry["data_offsets"]) for name, entry in entries.items()}
        tensors = {
            name: StoredTensor(
                path, str(entry["dtype"]), _whole(entry["shape"]), _LENGTH_BYTES + header_bytes + spans[name][0]
            )
            for name, entry in entries.items()
        }
        end = max((stop for _, stop in spans.values()), default=0)
    except Exception as error:
        return refuse(words_of(error), "a safetensors header")
    if size != _LENGTH_BYTES + header_bytes + end:
        return refuse(f"{size} bytes", f"{_LENGTH_BYTES + header_bytes + end} bytes")
    position = 0
    for name, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
        width = DTYPE_BYTES.get(tensors[name].dtype)
        expected = stop - start if width is None else width * math.prod(tensors[name].shape)
        if start != position or stop - start != expected or min(tensors[name].shape, default=0) < 0:
            return refuse(f"bytes {start} to {stop}", f"{expected} bytes from {position} on", name)
        position = stop
    return tensors


def _whole(values: Any) -> tuple[int, ...]:
    """The whole numbers of a list.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise TypeError(f"{values!r} is no list of whole numbers")
    return tuple(values)


def _pair(values: Any) -> tuple[int, int]:
    """Start and end.

    Raises:
        TypeError, ValueError: it is something else.
    """
    start, stop = _whole(values)
    return start, stop
