"""Sources of weights, read tensor by tensor: safetensors files of a Hugging Face directory, or random weights."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.tensor_shapes import hf_shapes
from ebft_mega.errors import InputError
from ebft_mega.model.weights.tensor_fit import check_fit
from ebft_mega.model.weights.weight_files import stored_tensors
from ebft_mega.model.weights.weight_layout import Box

TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


class WeightSource(Protocol):
    """Where a model's weights come from, one tensor at a time."""

    def place(self, name: str) -> str:
        """The file or files of a tensor, or what stands for one, that messages name."""
        ...

    def tensor(self, name: str) -> Tensor:
        """The full tensor of a Hugging Face name, on the CPU."""
        ...

    def part(self, name: str, box: Box) -> Tensor:
        """A part of it; no more than that is read where the source can do so."""
        ...


class InitialWeights(WeightSource, Protocol):
    """A source that says what its weights are, wherever they lie."""

    def digest_names(self) -> list[str]:
        """Names of what `digest` hashes: files, or tensors where there are none."""
        ...

    def digest(self, name: str) -> str:
        """The sha256 of one of them, in hexadecimal; it may have to be read."""
        ...


def identity(digests: Mapping[str, str]) -> str:
    """What a model's weights are, in one hash.

    Args:
        digests: of all `InitialWeights.digest_names()`, by name.
    """
    return hashlib.sha256("".join(f"{name}={digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


class SafetensorsWeights:
    """Weights of a Hugging Face directory; each call reads one tensor, or a part of it, from its file."""

    def __init__(self, directory: Path, architecture: Architecture, num_layers: int | None = None):
        """Check that every tensor is there with its shape, in a dtype that can be read, and that nothing else is.

        Args:
            directory: holds `model.safetensors`, or shards and `model.safetensors.index.json`.
            num_layers: check (and need) only the lowest layers, and no head; None: the whole model.
        Raises:
            InputError: missing, cut off or contradictory files, or else tensors that do not fit, all at once.
        """
        stored, problems = stored_tensors(directory)
        problems = problems or list(check_fit(directory, stored, architecture, num_layers).problems)
        if problems:
            raise InputError(problems)
        self._stored = {name: stored[name] for name in hf_shapes(architecture, num_layers)}

    def place(self, name: str) -> str:
        """The file of a tensor."""
        return str(self._stored[name].file)

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Dtype of every tensor as it is stored."""
        return {name: TORCH_DTYPES[stored.dtype] for name, stored in self._stored.items()}

    def tensor(self, name: str) -> Tensor:
        """Read one tensor."""
        with safe_open(self._stored[name].file, "pt") as file:
            return file.get_tensor(name)

    def part(self, name: str, box: Box) -> Tensor:
        """Read a part of one tensor."""
        with safe_open(self._stored[name].file, "pt") as file:
            part: Tensor = file.get_slice(name)[box]
            return part

    def digest_names(self) -> list[str]:
        """The files that hold the tensors."""
        return sorted(self._files)

    def digest(self, name: str) -> str:
        """Hash of a file's contents."""
        with self._files[name].open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def _files(self) -> dict[str, Path]:
        return {stored.file.name: stored.file for stored in self._stored.values()}


@dataclass(frozen=True)
class RoundedWeights:
    """Another source, some of whose tensors are rounded as a file of another dtype would have them."""

    source: WeightSource
    dtypes: Mapping[str, torch.dtype]  # of what is rounded, by name; the dtype in which it is handed out stays

    def place(self, name: str) -> str:
        """The place of the tensor that is rounded."""
        return self.source.place(name)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor."""
        return self._rounded(name, self.source.tensor(name))

    def part(self, name: str, box: Box) -> Tensor:
        """Read a part of one tensor."""
        return self._rounded(name, self.source.part(name, box))

    def _rounded(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtypes[name]).to(tensor.dtype) if name in self.dtypes else tensor


@dataclass(frozen=True)
class RandomWeights:
    """Initial weights that are a pure function of (seed, tensor name), so no layout changes them.

    Matrices are normal with Hugging Face's `initializer_range`, norms are one, biases zero.
    """

    architecture: Architecture
    seed: int

    def place(self, name: str) -> str:
        """What stands for a file in messages."""
        return f"random weights of seed {self.seed}"

    def tensor(self, name: str) -> Tensor:
        """Draw one tensor, float32."""
        shape = hf_shapes(self.architecture)[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        if name.endswith(".bias"):
            return torch.zeros(shape)
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        std = float(self.architecture.hf_config.get("initializer_range", 0.02))
        return torch.randn(shape, generator=generator) * std

    def part(self, name: str, box: Box) -> Tensor:
        """Draw one tensor and take a part of it."""
        return self.tensor(name)[box]

    def digest_names(self) -> list[str]:
        """The tensors."""
        return list(hf_shapes(self.architecture))

    def digest(self, name: str) -> str:
        """Hash of a tensor's float32 values, which are drawn for it."""
        return hashlib.sha256(self.tensor(name).numpy().data).hexdigest()
