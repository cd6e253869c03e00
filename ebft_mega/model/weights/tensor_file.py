"""Write a safetensors file tensor by tensor, with one tensor in memory at a time, and hash it on the way.

(The library's own writer wants all tensors of a file at once and copies them.) The format: 8 bytes with the length of
a JSON header, the header with name, dtype, shape and place of each tensor, then the tensors' bytes without gaps.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
_ALIGNMENT_BYTES = 8


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor will be."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class WrittenFile:
    """A file as it was handed to the disk."""

    bytes: int
    sha256: str


class TensorFileWriter:
    """One safetensors file, written from front to back.

    Args:
        path: where; an existing file is replaced.
        tensors: all tensors that will come, in their order.
        metadata: text for the header.
    Raises:
        OSError: here or later, when the disk is full or gone; what is there of the file stays.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None):
        self.path = path
        self._tensors = dict(tensors)
        self._missing = list(tensors)
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        end = 0
        for name, spec in tensors.items():
            start, end = end, end + spec.num_bytes
            header[name] = {
                "dtype": DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT_BYTES)
        self._hash = hashlib.sha256()
        self._file = open(path, "wb")
        self._put(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor.

        Args:
            name: the next one of `tensors`.
            tensor: of its dtype and shape, on any device.
        Raises:
            ValueError: it is another one.
        """
        expected = self._missing[0] if self._missing else None
        if name != expected:
            raise ValueError(f"{self.path}: {name} comes where {expected} was announced")
        spec = self._tensors[name]
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
            raise ValueError(f"{self.path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, announced as {spec}")
        # Bytes of bfloat16 have no other way to numpy.
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        self._put(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        del self._missing[0]

    def close(self) -> WrittenFile:
        """Bring the file to the disk.

        Raises:
            ValueError: an announced tensor has not come.
        """
        if self._missing:
            raise ValueError(f"{self.path}: {self._missing[0]} has not come")
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self._file.tell()
        self._file.close()
        return WrittenFile(size, self._hash.hexdigest())

    def abandon(self) -> None:
        """Close the file as it is, after a failure."""
        self._file.close()

    def _put(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._hash.update(content)
