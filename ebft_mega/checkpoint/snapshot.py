"""The state of policy, optimizer and token critic as shards of whole tensors: copied to host memory, then written.

The policy's and its optimizer's are shards of Hugging Face tensors.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ebft_mega.architecture.tensor_shapes import hf_shapes
from ebft_mega.checkpoint.manifest import FileRecord
from ebft_mega.checkpoint.tensor_index import IndexedTensor, TensorIndex, TensorShard
from ebft_mega.critic.critic_record import CRITIC_STATE, SQUARES, TABLE, products_name
from ebft_mega.critic.fitted_critic import CriticState
from ebft_mega.critic.own_channels import OwnChannels
from ebft_mega.io.durable import sync_directory
from ebft_mega.model.stage import Stage
from ebft_mega.model.weights.tensor_file import TensorFileWriter, TensorSpec
from ebft_mega.model.weights.weight_layout import packing_of
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.parallel.optimizer_state import StateKind, share_out
from ebft_mega.parallel.zero import ZeroEngine


@dataclass(frozen=True)
class StateShard:
    """A box of one tensor: weights or one of the optimizer's moments of a Hugging Face tensor, or a critic's."""

    kind: StateKind  # or `CRITIC_STATE`
    name: str
    offsets: tuple[int, ...]  # where the box begins in each dimension
    shape: tuple[int, ...]  # of the whole tensor
    tensor: Tensor  # float32, of a critic float64; on the CPU, unchanged by later steps


@dataclass(frozen=True)
class Written:
    """The files that a rank wrote."""

    files: dict[str, FileRecord]  # by path relative to the checkpoint's folder
    index: TensorIndex  # of this rank's shards alone


def take_snapshot(engine: ZeroEngine, stage: Stage) -> tuple[StateShard, ...]:
    """Copy this rank's shards of the weights and moments to host memory.

    Over all ranks every element of every Hugging Face tensor is in exactly one shard for each kind of state: vocabulary
    padding and the last stage's copy of a tied embedding are left out, and tensors that are whole on all
    tensor-parallel ranks are saved by the first of them. The data-parallel ranks divide the tensors of their
    model-parallel coordinate so that none has more than an equal share of the bytes plus one tensor. Training may
    continue as soon as this returns.

    Args:
        stage: what the engine trains.
    Returns:
        Sorted by kind, in the order of the stage's parameters.
    Memory: beside the shards two copies of one whole parameter, float32.
    Communication: that of `ZeroEngine.state_tensors` for each kind of state: over the data-parallel group 4 bytes
        per element of the stage (at stage 3 and of the padding to partitions of equal length); at stage 0, and for the
        moments before the first update, none.
    """
    roles, shapes, groups = stage.parameter_roles(), engine.parameter_shapes(), stage.groups
    whole_shapes = hf_shapes(stage.architecture)
    is_mine = {name: roles[name].is_counted(groups.tensor_parallel_rank) for name in shapes}
    sizes = [math.prod(shape) * is_mine[name] for _ in engine.state_kinds for name, shape in shapes.items()]
    owners = iter(share_out(sizes, groups.data_parallel_size))
    shards: list[StateShard] = []
    for kind in engine.state_kinds:
        for name, parameter in engine.state_tensors(kind):
            if next(owners) == groups.data_parallel_rank and is_mine[name]:
                shards += _shards_of(kind, name, parameter, stage, whole_shapes)
            del parameter  # so that the next one takes its place in memory
    return tuple(shards)


def _shards_of(
    kind: StateKind, name: str, parameter: Tensor, stage: Stage, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[StateShard]:
    """Copy this rank's boxes of the Hugging Face tensors that a parameter is made of, leaving empty boxes out."""
    groups = stage.groups
    packing = packing_of(name, stage.architecture, stage.shape.first_layer, groups.tensor_parallel_size)
    parts = packing.unpack(parameter.detach(), groups.tensor_parallel_rank)
    for source, part in zip(packing.sources, parts, strict=True):
        box = packing.box(shapes[source], groups.tensor_parallel_rank)
        if part.numel() > 0:
            copy = torch.empty(part.shape, dtype=torch.float32).copy_(part)
            yield StateShard(kind, source, tuple(side.start for side in box), shapes[source], copy)


def critic_shards(state: CriticState, channels: OwnChannels, groups: ProcessGroups) -> tuple[StateShard, ...]:
    """This rank's shards of what a token critic has learned; its weights follow from them.

    Over all ranks every number is in one shard. What all ranks have is saved by the first of the world; the
    data-parallel ranks divide the layers of their stage.

    Args:
        channels: those that this rank has.
    Memory: what is saved, in float64, where it does not lie on the CPU already.
    Communication: none.
    """

    def shard(name: str, tensor: Tensor, shape: tuple[int, ...] | None = None, start: int = 0) -> StateShard:
        whole = tuple(tensor.shape) if shape is None else shape
        offsets = (*(0 for _ in whole[1:]), start)
        return StateShard(CRITIC_STATE, name, offsets, whole, tensor.to("cpu", torch.float64))

    shards = []
    if groups.is_world_first:
        shards += [shard(TABLE, state.table), shard(SQUARES, state.statistics.squares)]
    products = state.statistics.products.unflatten(-1, (len(channels.layers), channels.vectors, channels.width))
    for place, index in enumerate(channels.layers):
        if place % groups.data_parallel_size == groups.data_parallel_rank:
            shape = (*products.shape[:2], channels.vectors, channels.hidden_size)
            shards.append(shard(products_name(index), products[:, :, place], shape, channels.hidden.start))
    return tuple(shards)


def write_state_shards(
    directory: Path, rank: int, shards: Sequence[StateShard], progress: Callable[[int], None] | None = None
) -> Written:
    """Write a rank's shards, one safetensors file for each kind of state, and fsync them.

    Runs in any thread.

    Args:
        directory: the checkpoint's folder; made if it is not there.
        rank: in the world, for the names of the files.
        progress: told the bytes of every tensor after it was written.
    Raises:
        OSError: the disk is full or gone.
    Communication: none.
    """
    files: dict[str, FileRecord] = {}
    kinds: dict[str, dict[str, IndexedTensor]] = {}
    for kind in dict.fromkeys(shard.kind for shard in shards):
        own = [shard for shard in shards if shard.kind == kind]
        (directory / kind).mkdir(parents=True, exist_ok=True)
        file = f"{kind}/rank-{rank:05d}.safetensors"
        files[file] = _write_file(directory / file, own, progress or (lambda num_bytes: None))
        kinds[kind] = {
            shard.name: IndexedTensor(
                shape=shard.shape,
                shards=(TensorShard(file=file, offsets=shard.offsets, sizes=tuple(shard.tensor.shape)),),
            )
            for shard in own
        }
        sync_directory(directory / kind)
    if files:
        sync_directory(directory)
    return Written(files, TensorIndex(version=1, kinds=kinds))


def _write_file(path: Path, shards: Sequence[StateShard], progress: Callable[[int], None]) -> FileRecord:
    specs = {shard.name: TensorSpec(shard.tensor.dtype, tuple(shard.tensor.shape)) for shard in shards}
    assert len(specs) == len(shards), f"{path} has two shards of a tensor"
    # The names are torch's: its distributed checkpoints can be read from these files too.
    places = {shard.name: {"saved_offsets": list(shard.offsets)} for shard in shards}
    writer = TensorFileWriter(path, specs, {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(places)})
    try:
        for shard in shards:
            writer.write(shard.name, shard.tensor)
            progress(specs[shard.name].num_bytes)
        written = writer.close()
    except BaseException:
        writer.abandon()
        raise
    return FileRecord(bytes=written.bytes, sha256=written.sha256)
