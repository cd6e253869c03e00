"""Read a checkpoint's tensors into any parallel layout: each rank reads only the bytes that it needs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.tensor_shapes import hf_shapes
from ebft_mega.checkpoint.model_folder import open_model_folder
from ebft_mega.checkpoint.saved_run import SavedRun
from ebft_mega.checkpoint.tensor_index import IndexedTensor, TensorIndex, TensorShard
from ebft_mega.config.entries import optimizer
from ebft_mega.config.schema import RunConfig
from ebft_mega.critic.critic_record import CRITIC_STATE, SQUARES, TABLE, CriticRecord, products_name
from ebft_mega.critic.fitted_critic import CriticState, FittedCritic
from ebft_mega.critic.own_channels import OwnChannels
from ebft_mega.critic.ridge import Statistics
from ebft_mega.errors import BrokenCheckpointError, Problem
from ebft_mega.extension.entry import place_of_entry
from ebft_mega.model.stage import Stage
from ebft_mega.model.weights.stage_weights import NotFinite
from ebft_mega.model.weights.tensor_file import DTYPE_NAMES
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
            kind: `weights`, or an optimizer's moment; name: of a Hugging Face tensor. Or `CRITIC_STATE` and its names.
            box: within the whole tensor; it may be empty.
        Returns:
            float32, of a critic float64, on the CPU.
        Raises:
            BrokenCheckpointError: there is no such tensor or shard, or the shards leave a part of the box open.
        """
        starts, stops = [side.start for side in box], [side.stop for side in box]
        dtype = torch.float64 if kind == CRITIC_STATE else torch.float32
        part = torch.empty([max(0, stop - start) for start, stop in zip(starts, stops, strict=True)], dtype=dtype)
        missing = part.numel()
        for shard in self._indexed(kind, name).shards:
            lower = [max(pair) for pair in zip(starts, shard.offsets, strict=True)]
            ends = (offset + size for offset, size in zip(shard.offsets, shard.sizes, strict=True))
            upper = [min(pair) for pair in zip(stops, ends, strict=True)]
            if all(low < up for low, up in zip(lower, upper, strict=True)):
                found = self._read(shard, name, _box(lower, upper, shard.offsets), DTYPE_NAMES[dtype])
                part[_box(lower, upper, starts)] = found
                missing -= found.numel()
        if missing:
            where, found_text = str(self.directory), f"{missing} elements of it are in no shard"
            raise BrokenCheckpointError([Problem(where, f"{kind}: {name}", found_text, "shards of the whole tensor")])
        return part

    def whole(self, kind: str, name: str) -> Tensor:
        """One tensor, all of it; see `part`."""
        return self.part(kind, name, tuple(slice(0, size) for size in self.shape(kind, name)))

    def _indexed(self, kind: str, name: str) -> IndexedTensor:
        tensor = self.index.kinds.get(kind, {}).get(name)
        if tensor is None:
            raise BrokenCheckpointError([Problem(str(self.directory), f"{kind}: {name}", "no such tensor", "a tensor")])
        return tensor

    def _read(self, shard: TensorShard, name: str, box: Box, dtype: str) -> Tensor:
        path, expected = self.directory / shard.file, f"{dtype} {tuple(shard.sizes)}"
        try:
            with safe_open(path, "pt") as file:
                stored = file.get_slice(name)
                found = f"{stored.get_dtype()} {tuple(stored.get_shape())}"
                if found == expected:
                    part: Tensor = stored[box]
                    return part
        except (OSError, SafetensorError) as error:
            found = f"unreadable: {error}"
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
        return self.tensors.whole("weights", name)

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
    _require_shapes(tensors, dict.fromkeys(kinds, hf_shapes(architecture)))


def _require_shapes(tensors: CheckpointTensors, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> None:
    """Make sure that a checkpoint has tensors of these names and shapes, by kind.

    Raises:
        BrokenCheckpointError: it has not.
    """
    problems = []
    for kind, of_kind in shapes.items():
        indexed: Mapping[str, IndexedTensor] = tensors.index.kinds.get(kind, {})
        for name, shape in of_kind.items():
            found = f"shape {tuple(indexed[name].shape)}" if name in indexed else "no such tensor"
            if found != f"shape {shape}":
                problems.append(Problem(str(tensors.directory), f"{kind}: {name}", found, f"shape {shape}"))
    if problems:
        raise BrokenCheckpointError(problems)


@dataclass(frozen=True)
class SavedState:
    """What a run takes over from a checkpoint beside its place in the data."""

    tensors: CheckpointTensors
    applied_updates: int  # by which the moments have come about
    critic: CriticRecord | None = None  # what the token critic has learned; None: the run has none, or begins it anew

    @property
    def weights(self) -> CheckpointWeights:
        """The policy's weights."""
        return CheckpointWeights(self.tensors)

    def token_table(self) -> Tensor | None:
        """Read the token critic's vectors of tokens, float32 [V, r]. Communication: none."""
        return None if self.critic is None else self.tensors.whole(CRITIC_STATE, TABLE).to(torch.float32)


def open_index(saved: SavedRun, config: RunConfig, architecture: Architecture, keeps_critic: bool) -> TensorIndex:
    """Where the tensors of a checkpoint lie: all that a run takes over, whole. No tensor is read.

    Args:
        architecture: of the run's policy.
        keeps_critic: the checkpoint has a token critic and the run takes over what it has learned.
    Raises:
        BrokenCheckpointError, InputError: see `open_model_folder` and `check_state`.
    """
    index = open_model_folder(saved.directory, hash_weights=False).index
    critic = saved.state.critic if keeps_critic else None
    check_state(CheckpointTensors(saved.directory, index), config, architecture, critic)
    return index


def check_state(
    tensors: CheckpointTensors, config: RunConfig, architecture: Architecture, critic: CriticRecord | None = None
) -> None:
    """Make sure that a checkpoint has the weights of a model, the moments of a run's optimizer and the state of its
    critic; nothing is read.

    Args:
        critic: what the checkpoint says of its token critic, if the run takes it over.
    Raises:
        BrokenCheckpointError: see `check_tensors`.
    """
    rule = optimizer(config)
    missing = [kind for kind in rule.moments if kind not in tensors.index.kinds]
    others = [kind for kind in tensors.index.kinds if kind not in (WEIGHTS, CRITIC_STATE, *rule.moments)]
    if missing and not rule.is_built_in():
        found = f"the moments {', '.join(others) or 'none'} of another version of the optimizer {rule.name}"
        expected = f"{', '.join(rule.moments)}, as {place_of_entry(type(rule))} has them"
        place = config.place("train.optimizer")
        raise BrokenCheckpointError([Problem(str(tensors.directory), "train.optimizer", found, expected).within(place)])
    shapes = dict.fromkeys((WEIGHTS, *rule.moments), hf_shapes(architecture))
    if critic is not None:
        shapes[CRITIC_STATE] = critic.shapes
    _require_shapes(tensors, shapes)


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


def restore_critic(critic: FittedCritic, channels: OwnChannels, saved: SavedState) -> None:
    """Let a token critic know what a checkpoint's has learned, whatever layout it comes from.

    Args:
        critic: with the checkpoint's vectors of tokens.
        channels: those that this rank has.
    Raises:
        BrokenCheckpointError, InputError: as `restore_engine`, or the sums are not those of any rollouts.
    Communication: that of `NotFinite.require_none`.
    """
    assert saved.critic is not None, "the checkpoint has a critic"
    length, size, *_ = saved.critic.shapes[SQUARES]
    not_finite = NotFinite()

    def read(name: str, box: Box) -> Tensor:
        part = saved.tensors.part(CRITIC_STATE, name, box)
        place = saved.tensors.place(CRITIC_STATE, name)
        not_finite.look_at(part, torch.float64, place, f"{CRITIC_STATE}: {name}")
        return part

    squares = read(SQUARES, (slice(0, length), slice(0, size), slice(0, size)))
    box = (slice(0, length), slice(0, size), slice(0, channels.vectors), channels.hidden)
    products = [read(products_name(index), box).flatten(-2) for index in channels.layers]
    products = [torch.zeros((length, size, 0), dtype=torch.float64), *products]
    not_finite.require_none()
    move = partial(Tensor.to, device=critic.groups.device)
    statistics = Statistics(move(squares), move(torch.cat(products, dim=-1)))
    try:
        critic.restore(CriticState(critic.table, statistics, saved.critic.batches, None))
    except torch.linalg.LinAlgError as error:  # the same squares on every rank
        place, key = saved.tensors.place(CRITIC_STATE, SQUARES), f"{CRITIC_STATE}: {SQUARES}"
        raise BrokenCheckpointError([Problem(place, key, str(error), "sums of squares of some rollouts")]) from None
