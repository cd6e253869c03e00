"""Read a checkpoint's tensors into any parallel layout: each rank reads only the bytes that it needs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.tensor_shapes import hf_shapes
from ebft_mega.checkpoint.tensor_index import IndexedTensor, TensorIndex, TensorShard
from ebft_mega.config.entries import optimizer
from ebft_mega.config.schema import RunConfig
from ebft_mega.errors import BrokenCheckpointError, Problem
from ebft_mega.extension.entry import place_of_entry
from ebft_mega.model.stage import Stage
from ebft_mega.model.weights.stage_weights import NotFinite
from ebft_mega.model.weights.weight_layout import Box, packing_of
from ebft_mega.parallel.optimizer_state import WEIGHTS, StateKind
from ebft_mega.parallel.zero import ZeroEngine


@dataclass(frozen=True)
class CheckpointTensors:
    """The tensors of a checkpoint. Files are those that the index names and are read as safetensors, nothing else."""

    directory: Path
    index: TensorIndex

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Shape of a whole tensor.

        Raises:
            BrokenCheckpointError: there is no such tensor.
        """
        return tuple(self._indexed(kind, name).shape)

    def place(self, kind: str, name: str) -> str:
        """The files of a tensor's shards, in a checkpoint that has it."""
        return ", ".join(sorted({str(self.directory / shard.file) for shard in self._indexed(kind, name).shards}))

    def part(self, kind: str, name: str, box: Box) -> Tensor:
        """A part of a tensor from the shards that overlap with it; of each no more than that is read.

        Args:
            kind: `weights`, or an optimizer's moment; name: of a Hugging Face tensor.
            box: within the whole tensor; it may be empty.
        Returns:
            float32, on the CPU.
        Raises:
            BrokenCheckpointError: there is no such tensor or shard, or the shards leave a part of the box open.
        """
        starts, stops = [side.start for side in box], [side.stop for side in box]
        part = torch.empty([max(0, stop - start) for start, stop in zip(starts, stops, strict=True)])
        missing = part.numel()
        for shard in self._indexed(kind, name).shards:
            lower = [max(pair) for pair in zip(starts, shard.offsets, strict=True)]
            ends = (offset + size for offset, size in zip(shard.offsets, shard.sizes, strict=True))
            upper = [min(pair) for pair in zip(stops, ends, strict=True)]
            if all(low < up for low, up in zip(lower, upper, strict=True)):
                found = self._read(shard, name, _box(lower, upper, shard.offsets))
                part[_box(lower, upper, starts)] = found
                missing -= found.numel()
        if missing:
            where, found_text = str(self.directory), f"{missing} elements of it are in no shard"
            raise BrokenCheckpointError([Problem(where, f"{kind}: {name}", found_text, "shards of the whole tensor")])
        return part

    def _indexed(self, kind: str, name: str) -> IndexedTensor:
        tensor = self.index.kinds.get(kind, {}).get(name)
        if tensor is None:
            raise BrokenCheckpointError([Problem(str(self.directory), f"{kind}: {name}", "no such tensor", "a tensor")])
        return tensor

    def _read(self, shard: TensorShard, name: str, box: Box) -> Tensor:
        path = self.directory / shard.file
        try:
            with safe_open(path, "pt") as file:
                stored = file.get_slice(name)
                found = f"{stored.get_dtype()} {tuple(stored.get_shape())}"
                if found == (expected := f"F32 {tuple(shard.sizes)}"):
                    part: Tensor = stored[box]
                    return part
        except (OSError, SafetensorError) as error:
            found, expected = f"unreadable: {error}", f"F32 {tuple(shard.sizes)}"
        raise BrokenCheckpointError([Problem(str(path), name, found, expected)])


def _box(lower: list[int], upper: list[int], origin: tuple[int, ...] | list[int]) -> Box:
    """The box between two corners, as seen from an origin."""
    return tuple(slice(low - zero, up - zero) for low, up, zero in zip(lower, upper, origin, strict=True))


@dataclass(frozen=True)
class CheckpointWeights:
    """The weights of a checkpoint as a `WeightSource`, for any layout and for warm starts."""

    tensors: CheckpointTensors

    def place(self, name: str) -> str:
        """The files of a tensor's shards."""
        return self.tensors.place("weights", name)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor."""
        return self.part(name, tuple(slice(0, size) for size in self.tensors.shape("weights", name)))

    def part(self, name: str, box: Box) -> Tensor:
        """Read a part of one tensor."""
        return self.tensors.part("weights", name, box)


def check_tensors(tensors: CheckpointTensors, architecture: Architecture, kinds: tuple[StateKind, ...]) -> None:
    """Make sure that a checkpoint has all tensors of a model, with its shapes; nothing of them is read.

    Args:
        kinds: of state that are needed; what else there is does not matter.
    Raises:
        BrokenCheckpointError: it has not; all problems at once.
    """
    problems = []
    for kind in kinds:
        indexed: Mapping[str, IndexedTensor] = tensors.index.kinds.get(kind, {})
        for name, shape in hf_shapes(architecture).items():
            found = f"shape {tuple(indexed[name].shape)}" if name in indexed else "no such tensor"
            if found != f"shape {shape}":
                problems.append(Problem(str(tensors.directory), f"{kind}: {name}", found, f"shape {shape}"))
    if problems:
        raise BrokenCheckpointError(problems)


def check_state(tensors: CheckpointTensors, config: RunConfig, architecture: Architecture) -> None:
    """Make sure that a checkpoint has the weights of a model and the moments of a run's optimizer; nothing is read.

    Raises:
        BrokenCheckpointError: see `check_tensors`.
    """
    rule = optimizer(config)
    missing = [kind for kind in rule.moments if kind not in tensors.index.kinds]
    others = [kind for kind in tensors.index.kinds if kind not in (WEIGHTS, *rule.moments)]
    if missing and not rule.is_built_in():
        found = f"the moments {', '.join(others) or 'none'} of another version of the optimizer {rule.name}"
        expected = f"{', '.join(rule.moments)}, as {place_of_entry(type(rule))} has them"
        place = config.place("train.optimizer")
        raise BrokenCheckpointError([Problem(str(tensors.directory), "train.optimizer", found, expected).within(place)])
    check_tensors(tensors, architecture, (WEIGHTS, *rule.moments))


def restore_engine(
    engine: ZeroEngine,
    stage: Stage,
    tensors: CheckpointTensors,
    applied_updates: int,
    count: Callable[[int], None] = lambda _: None,
) -> None:
    """Put a checkpoint's weights and moments into an engine, whatever layout and ZeRO stage they come from.

    Args:
        engine: of a stage that was filled from `CheckpointWeights` of the same tensors (see `ZeroEngine.restore`).
        stage: what the engine trains.
        applied_updates: by which the moments have come about.
        count: told of each tensor that is in place: one of each kind of state of each of the stage's parameters.
    Raises:
        BrokenCheckpointError: on one rank alone, if a file changed after it was checked.
        InputError: on every rank, naming all tensors in which some rank has read infinite values or NaN.
    Communication: that of `ZeroEngine.restore`, then that of `NotFinite.require_none`.
    """
    groups, shapes = stage.groups, hf_shapes(stage.architecture)
    not_finite = NotFinite()

    def read(kind: StateKind, name: str) -> Tensor:
        packing = packing_of(name, stage.architecture, stage.shape.first_layer, groups.tensor_parallel_size)
        parts = []
        for source in packing.sources:
            parts.append(tensors.part(kind, source, packing.box(shapes[source], groups.tensor_parallel_rank)))
            not_finite.look_at(parts[-1], torch.float32, tensors.place(kind, source), f"{kind}: {source}")
        return packing.pack(tuple(parts))

    engine.restore(read, applied_updates, count)
    not_finite.require_none()
