"""Write a Hugging Face model directory: weight files planned from tensor shapes and written tensor by tensor."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.tensor_shapes import hf_shapes
from ebft_mega.io.durable import flush_to_disk
from ebft_mega.io.output_directory import new_directory
from ebft_mega.model.weights.tensor_file import TensorFileWriter, TensorSpec
from ebft_mega.model.weights.weight_files import INDEX_NAME, SINGLE_NAME

CONFIG_NAME = "config.json"
SHARD_BYTES = 4 * 2**30  # of tensors in a file, unless given


@dataclass(frozen=True)
class Shard:
    """One file of weights."""

    name: str
    tensors: dict[str, TensorSpec]  # in the order in which they are written


def write_model(
    directory: Path,
    architecture: Architecture,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    described_by: Mapping[str, bytes] | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = True,
) -> None:
    """Write a Hugging Face model directory, tensor by tensor.

    The files are written under another name beside `directory` and take its place when all of them are on the disk.

    Memory: beside what `tensors` holds by itself, one tensor.

    Args:
        tensors: Hugging Face names with full tensors, in the order of `hf_shapes`; read to the end.
        dtype: of the written weights.
        described_by: contents by name of the files to put beside the weights: tokenizer, templates, how to generate.
        shard_bytes: how many bytes of tensors a file may have.
        overwrite: whether a model that is there already may be replaced.
    Raises:
        InputError: what stands at `directory` may not be replaced: another kind of directory, say.
        ValueError: `tensors` are not those of the architecture.
        OSError: the disk is full or gone. Then, too, what stood at `directory` is unharmed.
    """
    shards = plan_shards(hf_shapes(architecture), dtype, shard_bytes)
    with new_directory(directory, CONFIG_NAME, overwrite) as partial:
        write_shards(partial, shards, tensors)
        for name, content in (described_by or {}).items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(content)
        write_json(partial / CONFIG_NAME, architecture.exported_config(str(dtype).removeprefix("torch.")))
        for path in (*partial.rglob("*"), partial):
            flush_to_disk(path)
    flush_to_disk(directory.absolute().parent)


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
