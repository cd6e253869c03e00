"""ZeRO stage 0: every data-parallel rank has everything, and plain torch does the rest.

DeepSpeed's own stage 0 takes no gradient but that of a scalar loss, does not skip a step whose gradient is not finite,
and refuses to accumulate bfloat16 gradients in float32.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.parallel.optimizer import (
    Loader,
    OptimizerSettings,
    SharedGradients,
    StageRunner,
    Update,
    parameter_groups,
    runner,
    sum_over,
)
from ebft_mega.parallel.optimizer_state import StateKind, applied_updates, prepare_moments
from ebft_mega.parallel.roles import ParameterRole


class ReplicatedEngine:
    """A stage with float32 gradients and master weights, all of them on every data-parallel rank."""

    def __init__(
        self,
        build_stage: Callable[[], nn.Module],
        load: Loader,
        roles: Callable[[nn.Module], Mapping[str, ParameterRole]],
        settings: OptimizerSettings,
        groups: ProcessGroups,
    ):
        """As `ZeroEngine`."""
        self.module = replicated_module(build_stage, load, groups)
        self._settings, self._groups = settings, groups
        self._shared = SharedGradients.of(self.module, roles(self.module), groups.tensor_parallel_rank)
        parameters = list(self.module.parameters())
        self._masters = {parameter: parameter.detach().clone().float() for parameter in parameters}
        sizes = [parameter.numel() for parameter in parameters]
        self._flat_gradient = torch.zeros(sum(sizes), dtype=torch.float32, device=groups.device)
        self._gradients: dict[nn.Parameter, Tensor] = {}
        for parameter, gradient in zip(parameters, self._flat_gradient.split(sizes), strict=True):
            self._gradients[parameter] = self._masters[parameter].grad = gradient.view_as(parameter)
            parameter.register_post_accumulate_grad_hook(self._accumulate)
        in_groups = parameter_groups(self.module, settings.weight_decay)
        for group in in_groups:
            group["params"] = [self._masters[parameter] for parameter in group["params"]]
        self._optimizer = torch.optim.AdamW(in_groups, lr=0.0, betas=settings.betas)

    def forward(self, compute: Callable[[Any], Any]) -> Any:
        """See `ZeroEngine`."""
        return self.module(compute)

    def backward(self, loss: Tensor) -> None:
        """See `ZeroEngine`."""
        loss.backward()

    def backward_from(self, output: Tensor, gradient: Tensor) -> None:
        """See `ZeroEngine`."""
        output.backward(gradient)

    @torch.no_grad()
    def step(self, learning_rate: float) -> Update:
        """See `ZeroEngine`."""
        groups = self._groups
        dist.all_reduce(self._flat_gradient, group=groups.data_parallel)
        sum_over(groups.tensor_parallel, [self._gradients[parameter] for parameter in self._shared.partial])
        sum_over(groups.embedding, [self._gradients[parameter] for parameter in self._shared.tied])
        norm = self._global_norm()
        applied = bool(norm.isfinite())
        if applied:
            if self._settings.grad_clip > 0:
                self._flat_gradient.mul_((self._settings.grad_clip / (norm + 1e-6)).clamp(max=1.0))
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
            for parameter, master in self._masters.items():
                parameter.copy_(master)
        self._flat_gradient.zero_()
        return Update(norm.item() if applied else float("inf"), applied)

    @contextmanager
    def whole_parameters(self, recording: bool) -> Iterator[StageRunner]:
        """See `ZeroEngine`."""
        yield runner(self.module, recording)

    def state_tensors(self, kind: StateKind) -> Iterator[tuple[str, Tensor]]:
        """See `ZeroEngine`; the engine's own storage."""
        for name, parameter in self.module.named_parameters():
            yield name, self._state(kind, parameter)

    @property
    def applied_updates(self) -> int:
        """See `ZeroEngine`."""
        return applied_updates(self._optimizer, self._masters.values())

    def prepare_moments(self, applied_updates: int) -> None:
        """Make AdamW's state where there is none yet, and set its count."""
        prepare_moments(self._optimizer, self._masters.values(), applied_updates)

    def set_state(self, kind: StateKind, parameter: nn.Parameter, value: Tensor) -> None:
        """Replace a parameter's master weight or moment, after `prepare_moments`."""
        self._state(kind, parameter).copy_(value)

    def _state(self, kind: StateKind, parameter: nn.Parameter) -> Tensor:
        master = self._masters[parameter]
        if kind == "weights":
            return master
        state = self._optimizer.state.get(master)
        moment: Tensor = state[kind] if state else torch.zeros_like(master)
        return moment

    def _accumulate(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None, "the hook runs when there is a gradient"
        self._gradients[parameter].add_(parameter.grad)
        parameter.grad = None

    def _global_norm(self) -> Tensor:
        """L2 norm over all ranks of the replica; not finite if any gradient is not, also one that is not counted."""
        uncounted = set(self._shared.uncounted)
        squares = torch.zeros((), dtype=torch.float64, device=self._groups.device)
        for parameter, gradient in self._gradients.items():
            square = torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
            squares += torch.where(square.isfinite(), 0.0, torch.nan) if parameter in uncounted else square
        dist.all_reduce(squares, group=self._groups.model_parallel)
        return squares.sqrt().float()


def replicated_module(build_stage: Callable[[], nn.Module], load: Loader, groups: ProcessGroups) -> nn.Module:
    """A stage that is whole on every data-parallel rank; the first of them reads its values.

    Communication: one broadcast per parameter over the data-parallel group.
    """
    module = build_stage().to(groups.device)

    @contextmanager
    def shared_by_the_reader(parameter: nn.Parameter) -> Iterator[None]:
        yield
        dist.broadcast(parameter.data, group=groups.data_parallel, group_src=0)

    load(module, shared_by_the_reader, groups.data_parallel_rank == 0)
    return module
