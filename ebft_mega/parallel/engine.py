"""The interface of the training engines: one stage, its gradients and its optimizer, at any ZeRO stage."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Generic

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ebft_mega.errors import EntryError, Problem
from ebft_mega.extension.entry import place_of_entry
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.parallel.optimizer import (
    Fault,
    LookAtGradient,
    OptimizerSettings,
    SharedGradients,
    SlicedOptimizer,
    Update,
)
from ebft_mega.parallel.optimizer_state import WEIGHTS, StateKind, StateReader, share_out
from ebft_mega.parallel.roles import ParameterRole
from ebft_mega.parallel.stage_module import StageRunner, StageT
from ebft_mega.runtime.exchange import all_gather_values


class ZeroEngine(ABC, Generic[StageT]):
    """One (tensor, pipeline) coordinate's stage and its optimizer, partitioned over the data-parallel group.

    Between two optimizer steps forward and backward passes may come in any order, with one backward pass for each
    forward pass. Data-parallel ranks must have the same order, and use the same parameters in each pass.

    `parallel.zero.make_engine` builds the one for a ZeRO stage.

    Communication: every method is collective over the data-parallel group, `step` and `drop_gradient` over the world.
    """

    module: StageT  # at ZeRO stage 3 its parameters are empty outside of passes

    def __init__(
        self,
        module: StageT,
        roles: Callable[[StageT], Mapping[str, ParameterRole]],
        settings: OptimizerSettings,
        groups: ProcessGroups,
    ) -> None:
        """Take the module that an implementation has built and filled; the rest as `make_engine`."""
        self.module = module
        self.state_kinds = settings.state_kinds  # what there is for `state_tensors`
        self._settings = settings
        self._groups = groups
        self._shared = SharedGradients.of(module, roles(module), groups.tensor_parallel_rank)

    @abstractmethod
    def forward(self, compute: Callable[[StageT], Any]) -> Any:
        """Run `compute(stage)` recording gradients; at stage 3 parameters are gathered layer by layer.

        Args:
            compute: returns a tensor, or tensors in a tuple.
        """

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's share of the loss.

        Args:
            loss: scalar, computed from what `forward` returned; shares add up over micro-batches and data-parallel
                ranks to the loss of the step.
        """

    @abstractmethod
    def backward_from(self, output: Tensor, gradient: Tensor) -> None:
        """Add the gradient that comes back from the next pipeline stage.

        Args:
            output: what `forward` returned.
            gradient: of its shape, as the next stage's backward pass left it in that stage's input.
        """

    @abstractmethod
    def step(self, learning_rate: float, look: LookAtGradient | None = None) -> Update:
        """Clip by the global norm and update; a gradient that is not finite anywhere skips the step everywhere.

        Args:
            look: called once on every rank, with the reduced gradient before clipping; also in a step that is skipped.
        Returns:
            The same on every rank of the world.
        Raises:
            EntryError: on every rank, that of a plugin's optimizer on one of them.
        """

    @abstractmethod
    def drop_gradient(self, look: LookAtGradient) -> None:
        """Reduce and show the gradient as `step` does, then forget it: weights and the optimizer's state stay.

        Args:
            look: see `step`.
        """

    @abstractmethod
    def whole_parameters(self, recording: bool = False) -> AbstractContextManager[StageRunner]:
        """Context that gives a function to run on the stage with whole parameters.

        Args:
            recording: gradients are recorded, for a backward pass within this optimizer step, which has to go through
                `backward` or `backward_from`. The parameters must stay whole until then: at stage 3
                `hold_parameters` is `step`.
        Communication: at stage 3 one gather of all parameters, unless they are held from before; with
            `hold_parameters` none instead one gather per layer and call.
        """

    @abstractmethod
    def state_tensors(self, kind: StateKind) -> Iterator[tuple[str, Tensor]]:
        """Name and float32 state of each of this stage's parameters, one at a time, whole on every rank.

        Moments are zero before the first update. Padding of partitions is left out.

        Args:
            kind: one of `state_kinds`.
        Returns:
            Tensors to read, in the order of `named_parameters`. At stage 0 they are the engine's own: copy what has
            to last.
        Communication: over the data-parallel group, for each parameter: none at stage 0; at stages 1 and 2 one
            all-reduce of 4 bytes per element; at stage 3 one all-gather of 4 bytes per element and padding. None for
            moments before the first update.
        """

    @property
    @abstractmethod
    def applied_updates(self) -> int:
        """How often the optimizer has been applied to this stage; steps that were skipped do not count."""

    @abstractmethod
    def prepare_moments(self, applied_updates: int) -> None:
        """Make the optimizer's state where there is none yet, and set its count of updates."""

    @abstractmethod
    def set_state(self, kind: StateKind, parameter: nn.Parameter, value: Tensor) -> None:
        """Replace what this rank stores of a parameter's master weight or moment, after `prepare_moments`.

        Args:
            value: the whole parameter's, float32.
        """

    def shape_of(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Shape of a whole parameter, also where it is partitioned."""
        return tuple(parameter.shape)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each of this stage's parameters, also where they are partitioned."""
        return {name: self.shape_of(parameter) for name, parameter in self.module.named_parameters()}

    def local_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Name and float32 master weight of each of this stage's parameters; see `state_tensors`."""
        return self.state_tensors(WEIGHTS)

    def _require_faultless(self, optimizer: SlicedOptimizer) -> None:
        """Raise on every rank what a plugin's optimizer has done on any of them.

        Raises:
            EntryError: see `SlicedOptimizer.fault`; that of the first rank with one.
        Communication: for a plugin's optimizer one all-reduce of 4 bytes over the world.
        """
        if not self._settings.is_checked:
            return
        faults = torch.tensor(optimizer.fault is not None, dtype=torch.int32, device=self._groups.device)
        dist.all_reduce(faults)
        if not faults:
            return
        fault = next(each for each in all_gather_values(optimizer.fault, kinds=(Fault,)) if each is not None)
        rule = self._settings.rule
        found = f"{rule.name}, with {fault.found}"
        problem = Problem(place_of_entry(type(rule)), "train.optimizer", found, fault.expected)
        raise EntryError(problem.within(self._settings.place))

    @torch.no_grad()
    def restore(self, read: StateReader, applied_updates: int, count: Callable[[int], None] = lambda _: None) -> None:
        """Replace the whole state of the optimizer: master weights, moments and the count of updates.

        The parameters that passes compute with stay as they are, so the stage must have been filled with the same
        weights: a master weight rounded to `OptimizerSettings.dtype` is what the engine has then.

        Args:
            read: called for every kind of state and every parameter on one data-parallel rank each; returns its whole
                float32 value, on any device. If it raises, the other ranks are left waiting for this one.
            applied_updates: see there.
            count: told of each tensor that is in place, on every rank.
        Communication: for each kind and parameter one broadcast of 4 bytes per element over the data-parallel group.
        """
        self.prepare_moments(applied_updates)
        shapes, groups = self.parameter_shapes(), self._groups
        turns = [
            (kind, name, parameter) for kind in self.state_kinds for name, parameter in self.module.named_parameters()
        ]
        readers = share_out([math.prod(shapes[name]) for _, name, _ in turns], groups.data_parallel_size)
        for (kind, name, parameter), reader in zip(turns, readers, strict=True):
            whole = torch.empty(shapes[name], dtype=torch.float32, device=groups.device)
            if reader == groups.data_parallel_rank:
                value = read(kind, name)
                assert value.shape == whole.shape and value.dtype == whole.dtype, (kind, name, value.shape, value.dtype)
                whole.copy_(value)
                del value
            dist.broadcast(whole, group=groups.data_parallel, group_src=reader)
            self.set_state(kind, parameter, whole)
            count(1)
            del whole  # before the next one is made
