"""The index of a checkpoint's tensors: which file holds which shard, so that readers open only the files they need."""

import math
from collections.abc import Iterable, Iterator
from typing import Literal

from pydantic import ConfigDict, Field

from ebft_mega.critic.critic_record import CRITIC_STATE
from ebft_mega.errors import Problem
from ebft_mega.io.records import MAX_PROBLEMS, Count, InnerPath, Record, parse_record

INDEX_NAME = "tensors.json"
STATE_BYTES = 4  # of an element of each kind of a model's state: float32


class TensorShard(Record):
    """A box of a tensor in one file, under the tensor's own name."""

    file: InnerPath  # relative to the checkpoint's folder
    offsets: tuple[Count, ...]  # where the box begins in each dimension
    sizes: tuple[Count, ...]


class IndexedTensor(Record):
    """A tensor's whole shape, and its shards, which together make it up."""

    # The JSON key of the shards is `pieces`, part of the file format; Python code uses the field's name.
    model_config = ConfigDict(validate_by_name=True, serialize_by_alias=True)

    shape: tuple[Count, ...]
    shards: tuple[TensorShard, ...] = Field(validation_alias="pieces", serialization_alias="pieces")


class TensorIndex(Record):
    """The contents of `tensors.json`: for each kind of state, the tensors by their Hugging Face names."""

    version: Literal[1]
    kinds: dict[str, dict[str, IndexedTensor]]

    def to_json(self) -> str:
        """The index as one JSON object."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str | bytes, where: str = INDEX_NAME) -> "TensorIndex":
        """Read what `to_json` wrote.

        Args:
            where: the file that it comes from, for messages.
        Raises:
            BrokenCheckpointError: it is no such index.
            InputError: a newer version of this program has written it.
        """
        return parse_record(cls, text, where)


def merge_indices(parts: Iterable[TensorIndex]) -> TensorIndex:
    """One index from those of several ranks: the same whatever their order.

    Raises:
        ValueError: they name different shapes for one tensor.
    """
    shapes: dict[tuple[str, str], tuple[int, ...]] = {}
    shards: dict[tuple[str, str], list[TensorShard]] = {}
    for part in parts:
        for kind, tensors in part.kinds.items():
            for name, tensor in tensors.items():
                shape = shapes.setdefault((kind, name), tensor.shape)
                if shape != tensor.shape:
                    raise ValueError(f"{kind}: {name} is {shape} to one rank and {tensor.shape} to another")
                shards.setdefault((kind, name), []).extend(tensor.shards)
    kinds: dict[str, dict[str, IndexedTensor]] = {}
    for kind, name in sorted(shapes):
        found = sorted(shards[kind, name], key=lambda shard: (shard.offsets, shard.sizes, shard.file))
        kinds.setdefault(kind, {})[name] = IndexedTensor(shape=shapes[kind, name], shards=tuple(found))
    return TensorIndex(version=1, kinds=kinds)


def coverage_problems(index: TensorIndex, where: str = INDEX_NAME) -> list[Problem]:
    """Check that the shards of every tensor fill it exactly once; return at most `MAX_PROBLEMS` problems.

    The shards of a tensor lie inside its shape and fill it without overlap, no two of them in one file; a file holds
    one kind of state, whose name its folder has; all kinds have the same tensors, but for that of a token critic, which
    has its own.

    Args:
        where: the file that the index comes from, for messages.
    """
    problems = []
    of_model = [tensors for kind, tensors in index.kinds.items() if kind != CRITIC_STATE]
    shapes = {name: tensor.shape for tensors in of_model for name, tensor in tensors.items()}
    for kind, tensors in index.kinds.items():
        for name, shape in shapes.items() if kind != CRITIC_STATE else ():
            found = "no such tensor" if name not in tensors else str(tensors[name].shape)
            if found != str(shape):
                problems.append(Problem(where, f"{kind}: {name}", found, f"shape {shape}, as the other kinds have"))
        for name, tensor in tensors.items():
            expected = f"shards that fill {tensor.shape} once"
            problems += [Problem(where, f"{kind}: {name}", found, expected) for found in _flaws(kind, tensor)]
        if len(problems) >= MAX_PROBLEMS:
            break
    return problems[:MAX_PROBLEMS]


def _flaws(kind: str, tensor: IndexedTensor) -> Iterator[str]:
    """In words, what is wrong with the shards of one tensor."""
    inside = []
    for shard in tensor.shards:
        if not shard.file.startswith(f"{kind}/"):
            yield f"a shard in {shard.file}"
        if _is_inside(shard, tensor.shape):
            inside.append(shard)
        else:
            yield f"a shard at {shard.offsets} of {shard.sizes} in {shard.file}"
    files = [shard.file for shard in tensor.shards]
    for file in sorted({file for file in files if files.count(file) > 1}) if len(set(files)) < len(files) else ():
        yield f"more than one shard in {file}"
    if len(inside) < len(tensor.shards):
        return
    overlap = _overlap(inside)
    if overlap is not None:
        yield f"the shards in {overlap[0].file} and {overlap[1].file}, which overlap"
    filled, whole = sum(math.prod(shard.sizes) for shard in inside), math.prod(tensor.shape)
    if overlap is None and filled != whole:
        yield f"{filled} of {whole} elements"


def _is_inside(shard: TensorShard, shape: tuple[int, ...]) -> bool:
    """Whether a shard is a box of at least one element within a shape."""
    if not len(shard.offsets) == len(shard.sizes) == len(shape):
        return False
    ranges = zip(shard.offsets, shard.sizes, shape, strict=True)
    return all(length >= 1 and start + length <= end for start, length, end in ranges)


def _overlap(shards: list[TensorShard]) -> tuple[TensorShard, TensorShard] | None:
    """Two boxes that share an element, if there are any.

    Quick where shards follow each other in the first dimension; where they lie side by side, all pairs are compared.
    """
    shards = sorted(shards, key=lambda shard: shard.offsets)
    for index, shard in enumerate(shards):
        for other in shards[index + 1 :]:
            if other.offsets and other.offsets[0] >= shard.offsets[0] + shard.sizes[0]:
                break
            if _share_an_element(shard, other):
                return shard, other
    return None


def _share_an_element(shard: TensorShard, other: TensorShard) -> bool:
    sides = zip(shard.offsets, shard.sizes, other.offsets, other.sizes, strict=True)
    return all(start < low + length and low < start + size for start, size, low, length in sides)
