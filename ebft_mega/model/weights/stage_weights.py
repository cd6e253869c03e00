"""Fill a stage's parameters from a source of weights, and collect the whole model's tensors from all stages."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ebft_mega.architecture.tensor_shapes import hf_shapes
from ebft_mega.errors import InputError, Problem
from ebft_mega.metrics.announcer import Announcer
from ebft_mega.model.stage import Stage
from ebft_mega.model.weights.weight_layout import packing_of
from ebft_mega.model.weights.weight_sources import WeightSource
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.runtime.exchange import all_gather_values, broadcast_value
from ebft_mega.types import DTYPES

# As `load_weights`: stage, source, context in which a partitioned parameter is whole, whether this rank reads.
StageLoader = Callable[[Stage, WeightSource, Callable[[nn.Parameter], AbstractContextManager[Any]], bool], None]
_NAMES_OF_DTYPES = {dtype: name for name, dtype in DTYPES.items()}  # of a run's parameters


def load_weights(
    stage: Stage,
    source: WeightSource,
    gathered: Callable[[nn.Parameter], AbstractContextManager[Any]] = lambda _: nullcontext(),
    is_reader: bool = True,
    count: Callable[[int], None] = lambda _: None,
) -> None:
    """Fill a stage's parameters from a source, one parameter at a time, and check that every value is finite.

    Args:
        gathered: context in which a partitioned parameter is whole; what rank 0 of its group wrote is kept.
        is_reader: whether this rank reads the source (rank 0 of the partition's group, or everyone).
        count: told of each tensor that was read; there are `num_sources` of them.
    Raises:
        InputError: on every rank, naming all tensors in which some rank has read infinite values or NaN.
    Communication: that of `gathered`, then one gathering of names over the world.
    """
    groups, shapes = stage.groups, hf_shapes(stage.architecture)
    not_finite = NotFinite()
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            packing = packing_of(name, stage.architecture, stage.shape.first_layer, groups.tensor_parallel_size)
            with gathered(parameter):
                if is_reader:
                    parts = []
                    for hf_name in packing.sources:
                        parts.append(source.part(hf_name, packing.box(shapes[hf_name], groups.tensor_parallel_rank)))
                        not_finite.look_at(parts[-1], parameter.dtype, source.place(hf_name), hf_name)
                        count(1)
                    parameter.data.copy_(packing.pack(tuple(parts)))
    not_finite.require_none()


def num_sources(stage: Stage) -> int:
    """How many tensors, or parts of tensors, `load_weights` reads for a stage."""
    ranks, first_layer = stage.groups.tensor_parallel_size, stage.shape.first_layer
    names = (name for name, _ in stage.named_parameters())
    return sum(len(packing_of(name, stage.architecture, first_layer, ranks).sources) for name in names)


def announced_loader(network: str, announcer: Announcer) -> StageLoader:
    """`load_weights` for a network, announced as a phase of its own.

    Args:
        network: what it is, in words.
        announcer: says how far the loading has come.
    """

    def load(
        stage: Stage,
        source: WeightSource,
        gathered: Callable[[nn.Parameter], AbstractContextManager[Any]],
        is_reader: bool,
    ) -> None:
        total = num_sources(stage)
        with announcer.phase(f"filling {network} with weights, {total} tensors", total, "tensors") as count:
            load_weights(stage, source, gathered, is_reader, count)

    return load


class NotFinite:
    """Tensors with values that are not finite, as one rank reads them."""

    def __init__(self) -> None:
        self._problems: list[Problem] = []

    def look_at(self, tensor: Tensor, dtype: torch.dtype, place: str, name: str) -> None:
        """Take in a tensor, or a part of it, that is used in a dtype.

        Args:
            place: its file, for the message.
            name: its name there.
        """
        if (found := not_finite_as(tensor, dtype)) is not None:
            self._problems.append(Problem(place, name, found, "finite values"))

    def require_none(self) -> None:
        """Make sure that no rank has found any.

        Raises:
            InputError: on every rank, naming all tensors that any rank has found.
        Communication: one gathering of problems over the world.
        """
        found = all_gather_values(self._problems)
        problems = {(problem.where, problem.key): problem for of_rank in found for problem in of_rank}
        if problems:
            raise InputError([problems[place] for place in sorted(problems)])


def not_finite_as(tensor: Tensor, dtype: torch.dtype) -> str | None:
    """What of a tensor is not finite once it is converted to a dtype, in words; None: nothing.

    Minimum and maximum need no second tensor, and are NaN if any value is NaN. Rounding keeps their order.
    """
    if not tensor.numel():
        return None
    extremes = torch.stack(torch.aminmax(tensor))
    if not extremes.isfinite().all():
        return "values that are infinite or no numbers"
    if not extremes.to(dtype).isfinite().all():
        return f"values beyond the range of {str(dtype).removeprefix('torch.')}"
    return None


def hf_tensors(parameters: Iterable[tuple[str, Tensor]], stage: Stage) -> Iterator[tuple[str, Tensor]]:
    """The whole model as Hugging Face tensors, one after another, the same on every rank.

    Args:
        parameters: name and this rank's slice of every parameter of the stage, in the stage's order.
        stage: this rank's stage (its parameters are not looked at, only what they are).
    Communication: per parameter one all-gather over the tensor-parallel group if it is sliced, then one broadcast
        along the pipeline; every rank has to exhaust the iterator.
    """
    groups, ranks = stage.groups, stage.groups.tensor_parallel_size
    roles = stage.parameter_roles()
    for turn in range(groups.pipeline_size):
        if turn == groups.pipeline_rank:
            for name, parameter in parameters:
                if roles[name].copy:
                    continue
                packing = packing_of(name, stage.architecture, stage.shape.first_layer, ranks)
                slices = tuple(torch.empty_like(parameter) for _ in range(ranks))
                if roles[name].sharded:
                    dist.all_gather(list(slices), parameter.contiguous(), group=groups.tensor_parallel)
                else:
                    slices = (parameter,) * ranks
                for pair in zip(packing.sources, packing.whole(slices), strict=True):
                    _announce(pair, groups)
                    yield pair
            _announce(None, groups)
        else:
            while (heard := _hear(turn, groups)) is not None:
                yield heard


def _announce(pair: tuple[str, Tensor] | None, groups: ProcessGroups) -> None:
    """Broadcast a named tensor of this stage to the other stages; None: there is no more."""
    if groups.pipeline_size == 1:
        return
    header = None if pair is None else [pair[0], list(pair[1].shape), _NAMES_OF_DTYPES[pair[1].dtype]]
    group, own = groups.pipeline_parallel, groups.pipeline_rank
    broadcast_value(header, group, own)
    if pair is not None:
        dist.broadcast(pair[1].contiguous(), group=group, group_src=own)


def _hear(stage: int, groups: ProcessGroups) -> tuple[str, Tensor] | None:
    """Receive what a stage announces next; None: it has no more."""
    header = broadcast_value(None, groups.pipeline_parallel, stage)
    if header is None:
        return None
    name, shape, dtype = header
    tensor = torch.empty(shape, dtype=DTYPES[dtype], device=groups.device)
    dist.broadcast(tensor, group=groups.pipeline_parallel, group_src=stage)
    return name, tensor
