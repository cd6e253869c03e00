"""Write the weight files of a Hugging Face directory: split from the tensors' shapes, then written tensor by tensor."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebft_mega.model.weights.tensor_file import TensorFileWriter, TensorSpec
from ebft_mega.model.weights.weight_files import INDEX_NAME, SINGLE_NAME


@dataclass(frozen=True)
class Shard:
    """One file of weights."""

    name: str
    tensors: dict[str, TensorSpec]  # in the order in which they are written


def plan_shards(shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, shard_bytes: int) -> tuple[Shard, ...]:
    """Cut a model into files, in the order of its tensors.

    Args:
        shapes: of all tensors, by name.
        dtype: of the written weights.
        shard_bytes: how many bytes of tensors a file may have; one with a single tensor may have more.
    """
    files: list[dict[str, TensorSpec]] = [{}]
    room = shard_bytes
    for name, shape in shapes.items():
        spec = TensorSpec(dtype, tuple(shape))
        if files[-1] and spec.num_bytes > room:
            files.append({})
            room = shard_bytes
        files[-1][name] = spec
        room -= spec.num_bytes
    if len(files) == 1:
        return (Shard(SINGLE_NAME, files[0]),)
    return tuple(
        Shard(f"model-{number:05d}-of-{len(files):05d}.safetensors", tensors)
        for number, tensors in enumerate(files, start=1)
    )


def write_shards(directory: Path, shards: Sequence[Shard], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write all files of weights, and the index where there are several.

    Memory: beside what `tensors` holds by itself, one tensor.

    Args:
        directory: exists already.
        tensors: all tensors of the shards in their order, of any floating dtype and on any device; read to the end.
    Raises:
        ValueError: a tensor is missing, is not announced, comes too early or has another shape.
        OSError: the disk is full or gone.
    """
    arriving = iter(tensors)
    for shard in shards:
        writer = TensorFileWriter(directory / shard.name, shard.tensors)
        try:
            for name, spec in shard.tensors.items():
                _write_next(writer, arriving, name, spec)
            writer.close()
        except BaseException:
            writer.abandon()
            raise
    if (extra := next(arriving, None)) is not None:
        raise ValueError(f"{directory}: {extra[0]} comes after the last tensor that was announced")
    if len(shards) > 1:
        weight_map = {name: shard.name for shard in shards for name in shard.tensors}
        total = sum(spec.num_bytes for shard in shards for spec in shard.tensors.values())
        write_json(directory / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_next(writer: TensorFileWriter, arriving: Iterator[tuple[str, Tensor]], name: str, spec: TensorSpec) -> None:
    """Pass one tensor on; a function of its own, so that nothing keeps it while the next one is made."""
    found = next(arriving, None)
    if found is None:
        raise ValueError(f"{writer.path}: {name} has not come")
    writer.write(found[0], found[1].detach().to("cpu", spec.dtype))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file as people read it."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
