"""The training engine at ZeRO stage 0, in plain torch: every data-parallel rank holds all parameters and state.

DeepSpeed's own stage 0 supports backward passes from a scalar loss only, does not skip a step whose gradient is not
finite, and refuses to accumulate bfloat16 gradients in float32.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ebft_mega.parallel.engine import ZeroEngine
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.parallel.optimizer import (
    GradientPart,
    LookAtGradient,
    OptimizerSettings,
    SlicedOptimizer,
    Update,
    has_finite_squares,
    parameter_groups,
    share_of,
    sum_over,
)
from ebft_mega.parallel.optimizer_state import WEIGHTS, StateKind, applied_updates, prepare_moments
from ebft_mega.parallel.roles import ParameterRole
from ebft_mega.parallel.stage_module import Loader, StageRunner, StageT, replicated_module, runner


class ReplicatedEngine(ZeroEngine[StageT]):
    """A stage with float32 gradients and master weights, all of them on every data-parallel rank."""

    def __init__(
        self,
        build_stage: Callable[[], StageT],
        load: Loader[StageT],
        roles: Callable[[StageT], Mapping[str, ParameterRole]],
        settings: OptimizerSettings,
        groups: ProcessGroups,
    ) -> None:
        """Arguments as of `make_engine`."""
        super().__init__(replicated_module(build_stage, load, groups), roles, settings, groups)
        parameters = list(self.module.parameters())
        self._masters = {parameter: parameter.detach().clone().float() for parameter in parameters}
        sizes = [parameter.numel() for parameter in parameters]
        self._flat_gradient = torch.zeros(sum(sizes), dtype=torch.float32, device=groups.device)
        self._gradients: dict[nn.Parameter, Tensor] = {}
        for parameter, gradient in zip(parameters, self._flat_gradient.split(sizes), strict=True):
            self._gradients[parameter] = self._masters[parameter].grad = gradient.view_as(parameter)
            parameter.register_post_accumulate_grad_hook(self._accumulate)
        in_groups = parameter_groups(self.module, self.parameter_shapes(), settings.weight_decay)
        for group in in_groups:
            group["params"] = [self._masters[parameter] for parameter in group["params"]]
        self._optimizer = SlicedOptimizer(in_groups, settings)

    def forward(self, compute: Callable[[StageT], Any]) -> Any:
        """Call the module."""
        return self.module(compute)

    def backward(self, loss: Tensor) -> None:
        """Run torch's backward pass; a hook moves each gradient into the float32 buffer."""
        loss.backward()

    def backward_from(self, output: Tensor, gradient: Tensor) -> None:
        """Run torch's backward pass from the gradient of the stage's output."""
        output.backward(gradient)

    @torch.no_grad()
    def step(self, learning_rate: float, look: LookAtGradient | None = None) -> Update:
        """Sum gradients over the ranks that share a parameter, clip, and update the master weights.

        Communication: one all-reduce of all float32 gradients over the data-parallel group, one of the partial ones
            over the tensor-parallel group, one of the tied ones over both ends of the pipeline, one of 8 bytes over
            the replica; that of `_require_faultless`.
        """
        self._reduce()
        if look is not None:
            look(self._shown())
        norm = self._global_norm()
        applied = bool(norm.isfinite())
        if applied:
            if self._settings.grad_clip > 0:
                self._flat_gradient.mul_((self._settings.grad_clip / (norm + 1e-6)).clamp(max=1.0))
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
            self._require_faultless(self._optimizer)
            for parameter, master in self._masters.items():
                parameter.copy_(master)
        self._flat_gradient.zero_()
        return Update(norm.item() if applied else float("inf"), applied)

    @torch.no_grad()
    def drop_gradient(self, look: LookAtGradient) -> None:
        """Sum gradients as `step` does, show them, and zero their buffer.

        Communication: the first three of `step`.
        """
        self._reduce()
        look(self._shown())
        self._flat_gradient.zero_()

    @contextmanager
    def whole_parameters(self, recording: bool = False) -> Iterator[StageRunner]:
        """Give the module itself: its parameters are always whole."""
        yield runner(self.module, recording)

    def state_tensors(self, kind: StateKind) -> Iterator[tuple[str, Tensor]]:
        """Name and float32 state of each parameter: the engine's own storage, not a copy."""
        for name, parameter in self.module.named_parameters():
            yield name, self._state(kind, parameter)

    @property
    def applied_updates(self) -> int:
        """The optimizer's own count."""
        return applied_updates(self._optimizer, self._masters.values())

    def prepare_moments(self, applied_updates: int) -> None:
        """Make the optimizer's state for the master weights where there is none yet, and set its count."""
        prepare_moments(self._optimizer, self._settings.rule.moments, self._masters.values(), applied_updates)

    def set_state(self, kind: StateKind, parameter: nn.Parameter, value: Tensor) -> None:
        """Overwrite a parameter's whole master weight or moment."""
        self._state(kind, parameter).copy_(value)

    def _state(self, kind: StateKind, parameter: nn.Parameter) -> Tensor:
        master = self._masters[parameter]
        if kind == WEIGHTS:
            return master
        state = self._optimizer.state.get(master)
        moment: Tensor = state[kind] if state else torch.zeros_like(master)
        return moment

    def _accumulate(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None, "the hook runs when there is a gradient"
        self._gradients[parameter].add_(parameter.grad)
        parameter.grad = None

    def _reduce(self) -> None:
        groups = self._groups
        dist.all_reduce(self._flat_gradient, group=groups.data_parallel)
        sum_over(groups.tensor_parallel, [self._gradients[parameter] for parameter in self._shared.partial])
        sum_over(groups.embedding, [self._gradients[parameter] for parameter in self._shared.tied])

    def _shown(self) -> Iterator[GradientPart]:
        for name, parameter in self.module.named_parameters():
            yield GradientPart(name, *share_of(self._gradients[parameter], self._groups))

    def _global_norm(self) -> Tensor:
        """L2 norm over all ranks of the replica.

        Not finite if any gradient is not, also one that is not counted, or if it is not clipped and its square is not.
        """
        uncounted = set(self._shared.uncounted)
        squares = torch.zeros((), dtype=torch.float64, device=self._groups.device)
        for parameter, gradient in self._gradients.items():
            square = torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
            if not self._settings.clips_squares:
                square = torch.where(has_finite_squares(gradient), square, torch.nan)
            squares += torch.where(square.isfinite(), 0.0, torch.nan) if parameter in uncounted else square
        dist.all_reduce(squares, group=self._groups.model_parallel)
        return squares.sqrt().float()
