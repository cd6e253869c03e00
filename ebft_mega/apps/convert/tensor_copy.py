"""Convert a model's tensors one at a time to a dtype, and check that every value is finite."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.tensor_shapes import hf_shapes
from ebft_mega.errors import InputError, Problem
from ebft_mega.io.progress_bar import track
from ebft_mega.model.weights.stage_weights import not_finite_as
from ebft_mega.model.weights.weight_sources import WeightSource

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def converted_tensors(
    source: WeightSource, architecture: Architecture, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a model in the order of `hf_shapes`, converted to a dtype.

    Memory: one tensor as it is stored (memory-mapped if it comes from a file), and one in the new dtype.

    Raises:
        InputError: at the end, naming every tensor with values that are not finite, in the source or in `dtype`.
    """
    problems: list[Problem] = []
    names = list(hf_shapes(architecture))
    for name in track(names, len(names), "tensors"):
        yield name, _converted(source, name, dtype, problems)
    if problems:
        raise InputError(problems)


def _converted(source: WeightSource, name: str, dtype: torch.dtype, problems: list[Problem]) -> Tensor:
    """Convert one tensor. Being a function, it frees the stored tensor before the next one is read."""
    stored = source.tensor(name)
    if (found := not_finite_as(stored, dtype)) is not None:
        problems.append(Problem(source.place(name), name, found, "finite values"))
    return stored.to(dtype)
