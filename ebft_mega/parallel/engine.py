"""Stages whose training state is divided over data-parallel ranks (ZeRO stages 0 to 3), one interface for all."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ebft_mega.parallel.deepspeed_adapter.deepspeed_engine import (
    DeepSpeedEngine,
    frozen_config,
    gather,
    partitioned_module,
    release,
)
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.parallel.optimizer import Loader, OptimizerSettings, StageRunner, Update, runner
from ebft_mega.parallel.optimizer_state import STATE_KINDS, StateKind, StateReader, share_out
from ebft_mega.parallel.replicated import ReplicatedEngine
from ebft_mega.parallel.roles import ParameterRole

__all__ = ["Loader", "OptimizerSettings", "StageRunner", "ShardedStage", "Update", "ZeroEngine"]


class ZeroEngine:
    """One (tensor, pipeline) coordinate's stage and its optimizer, divided over the data-parallel group.

    Between two optimizer steps any order of forward and backward passes will do, with one backward pass for each
    forward pass. Data-parallel ranks must have the same order, and use the same parameters in each pass.

    Communication: every method is collective over the data-parallel group, `step` over the world.
    """

    def __init__(
        self,
        build_stage: Callable[[], nn.Module],
        load: Loader,
        roles: Callable[[nn.Module], Mapping[str, ParameterRole]],
        settings: OptimizerSettings,
        groups: ProcessGroups,
    ):
        """Build a stage, fill it, and make its optimizer.

        Args:
            build_stage: makes the module, which must have matrices and vectors and whose forward(compute) is
                compute(module). At stage 3 parameters are partitioned as they are made, so no rank ever holds the
                whole stage.
            load: fills the module given (module, context that makes one parameter whole, whether this rank reads).
            roles: what the module's parameters are to the other ranks of the replica, by name; one that is not named
                is whole on every tensor-parallel rank.
            settings, groups: see there.
        Raises:
            RuntimeError: a DeepSpeed release that was never checked, or stages with different optimizer sub-groups.
        """
        kind = ReplicatedEngine if settings.zero_stage == 0 else DeepSpeedEngine
        self._engine: ReplicatedEngine | DeepSpeedEngine = kind(build_stage, load, roles, settings, groups)
        self._groups = groups

    @property
    def module(self) -> nn.Module:
        """The stage; at stage 3 its parameters are empty."""
        return self._engine.module

    def forward(self, compute: Callable[[Any], Any]) -> Any:
        """Run `compute(stage)` recording gradients; at stage 3 parameters are gathered layer by layer.

        Args:
            compute: returns a tensor, or tensors in a tuple.
        """
        return self._engine.forward(compute)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's share of the loss.

        Args:
            loss: scalar, computed from what `forward` returned; shares add up over micro-batches and data-parallel
                ranks to the loss of the step.
        """
        self._engine.backward(loss)

    def backward_from(self, output: Tensor, gradient: Tensor) -> None:
        """Add the gradient that comes back from the next pipeline stage.

        Args:
            output: what `forward` returned.
            gradient: of its shape, as the next stage's backward pass left it in that stage's input.
        """
        self._engine.backward_from(output, gradient)

    def step(self, learning_rate: float) -> Update:
        """Clip by the global norm and apply AdamW; a gradient that is not finite anywhere skips the step everywhere.

        Returns:
            The same on every rank of the world.
        """
        return self._engine.step(learning_rate)

    def whole_parameters(self, recording: bool = False) -> AbstractContextManager[StageRunner]:
        """Context that gives a function to run on the stage with whole parameters.

        Args:
            recording: gradients are recorded, for a backward pass within this optimizer step, which has to go through
                `backward` or `backward_from`. The parameters must stay whole until then: at stage 3
                `hold_parameters` is `step`.
        Communication: at stage 3 one gather of all parameters, unless they are held from before; with
            `hold_parameters` none instead one gather per layer and call.
        """
        return self._engine.whole_parameters(recording)

    def local_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Name and float32 master weight of each of this stage's parameters; see `state_tensors`."""
        return self.state_tensors("weights")

    def state_tensors(self, kind: StateKind) -> Iterator[tuple[str, Tensor]]:
        """Name and float32 state of each of this stage's parameters, one at a time, whole on every rank.

        Moments are zero before the first update. Padding of partitions is left out.

        Args:
            kind: one of `STATE_KINDS`.
        Returns:
            Tensors to read, in the order of `named_parameters`. At stage 0 they are the engine's own: copy what has
            to last.
        Communication: over the data-parallel group, for each parameter: none at stage 0; at stages 1 and 2 one
            all-reduce of 4 bytes per element; at stage 3 one all-gather of 4 bytes per element and padding. None for
            moments before the first update.
        """
        return self._engine.state_tensors(kind)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each of this stage's parameters, also where they are partitioned."""
        return {
            name: tuple(getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in self.module.named_parameters()
        }

    @property
    def applied_updates(self) -> int:
        """How often AdamW has been applied to this stage; steps that were skipped do not count."""
        return self._engine.applied_updates

    @torch.no_grad()
    def restore(self, read: StateReader, applied_updates: int) -> None:
        """Replace the whole state of the optimizer: master weights, moments and the count of updates.

        The parameters that passes compute with stay as they are, so the stage must have been filled with the same
        weights: a master weight rounded to `settings.dtype` is what the engine has then.

        Args:
            read: called for every kind of state and every parameter on one data-parallel rank each; returns its whole
                float32 value, on any device. If it raises, the other ranks are left waiting for this one.
            applied_updates: see there.
        Communication: for each kind and parameter one broadcast of 4 bytes per element over the data-parallel group.
        """
        self._engine.prepare_moments(applied_updates)
        shapes, groups = self.parameter_shapes(), self._groups
        turns = [(kind, name, parameter) for kind in STATE_KINDS for name, parameter in self.module.named_parameters()]
        readers = share_out([math.prod(shapes[name]) for _, name, _ in turns], groups.data_parallel_size)
        for (kind, name, parameter), reader in zip(turns, readers, strict=True):
            whole = torch.empty(shapes[name], dtype=torch.float32, device=groups.device)
            if reader == groups.data_parallel_rank:
                value = read(kind, name)
                assert value.shape == whole.shape and value.dtype == whole.dtype, (kind, name, value.shape, value.dtype)
                whole.copy_(value)
                del value
            dist.broadcast(whole, group=groups.data_parallel, group_src=reader)
            self._engine.set_state(kind, parameter, whole)
            del whole  # before the next one is made


class ShardedStage:
    """A frozen stage whose parameters are partitioned over the data-parallel group; no optimizer, no hooks."""

    def __init__(self, build_stage: Callable[[], nn.Module], load: Loader, dtype: torch.dtype, groups: ProcessGroups):
        """Build a partitioned stage and fill it; arguments as in `ZeroEngine`.

        Args:
            dtype: of the parameters. A stage may have none: a pipeline can be longer than a feature network is deep.
        """
        config = frozen_config(dtype)
        self.module = partitioned_module(build_stage, load, config, groups).requires_grad_(False).eval()

    @contextmanager
    def whole_parameters(self) -> Iterator[StageRunner]:
        """Context that gives a function to run on the stage with whole parameters, without recording gradients.

        Communication: one gather of all parameters over the data-parallel group.
        """
        gathered = gather(self.module.parameters())
        try:
            yield runner(self.module)
        finally:
            release(gathered)
