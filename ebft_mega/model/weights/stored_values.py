"""Compare values of stored tensors without torch: with each other, with zero, with numbers that are known."""

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ebft_mega.model.weights.weight_files import StoredTensor

_STORED_AS = {"F32": "<f4", "BF16": "<u2", "F16": "<f2", "F64": "<f8"}
READABLE_DTYPES = tuple(_STORED_AS)
_CHUNK_ELEMENTS = 4 * 2**20
# Relative error of a stored rotary frequency that was rounded to the dtype. float16 has few digits for small numbers.
_ROUNDING = {"F64": 1e-5, "F32": 1e-5, "BF16": 1e-2, "F16": 1e-2}
_SMALLEST_FLOAT16 = 6e-8


def equal_values(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two tensors of one shape and of readable dtypes hold the same numbers; NaN equals nothing.

    Both are read, up to the first difference, once in a process as long as their files do not change.

    Raises:
        OSError: a file cannot be read.
    """
    return _equal_values(first, second, _state_of(first.file), _state_of(second.file))


@functools.lru_cache(maxsize=16)
def _equal_values(first: StoredTensor, second: StoredTensor, *_states: tuple[int, ...]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(_chunks(first), _chunks(second), strict=True))


def _state_of(path: Path) -> tuple[int, ...]:
    """What changes when a file is written or replaced."""
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def is_zero(tensor: StoredTensor) -> bool:
    """Whether all values of a tensor of a readable dtype are zero.

    Raises:
        OSError: the file cannot be read.
    """
    return not any(chunk.any() for chunk in _chunks(tensor))


def are_frequencies(tensor: StoredTensor, expected: Sequence[float]) -> bool:
    """Whether a tensor of a readable dtype holds these rotary frequencies, rounded to its dtype.

    Raises:
        OSError: the file cannot be read.
    """
    if tensor.shape != (len(expected),):
        return False
    found = np.concatenate([chunk.astype(np.float64) for chunk in _chunks(tensor)])
    spacing = _SMALLEST_FLOAT16 if tensor.dtype == "F16" else 0.0
    return bool(np.allclose(found, expected, rtol=_ROUNDING[tensor.dtype], atol=spacing))


def _chunks(tensor: StoredTensor) -> Iterator[np.ndarray]:
    """The values of a tensor in their order, float16, float32 or float64 [at most _CHUNK_ELEMENTS]."""
    dtype = np.dtype(_STORED_AS[tensor.dtype])
    left = int(np.prod(tensor.shape, dtype=np.int64))
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        while left:
            chunk = np.fromfile(file, dtype, min(left, _CHUNK_ELEMENTS))
            if not chunk.size:
                raise OSError(f"{tensor.file} ends too early")
            left -= chunk.size
            yield (chunk.astype(np.uint32) << 16).view(np.float32) if tensor.dtype == "BF16" else chunk
