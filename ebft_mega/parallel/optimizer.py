"""What an optimizer step is told and what it reports, whatever holds the parameters."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ebft_mega.parallel.roles import ParameterRole

StageRunner = Callable[[Callable[[Any], Any]], Any]  # run(compute) is compute(stage) with whole parameters
# Fills a module: (module, context that makes one parameter whole, whether this rank reads the values).
Loader = Callable[[nn.Module, Callable[[nn.Parameter], AbstractContextManager[Any]], bool], None]


def runner(module: Any, recording: bool = False) -> StageRunner:
    """Runs functions on a module, recording gradients or nothing."""

    def run(compute: Callable[[Any], Any]) -> Any:
        with torch.set_grad_enabled(recording):
            return compute(module)

    return run


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW, and how parameters, gradients and its state are kept."""

    betas: tuple[float, float]
    weight_decay: float  # on matrices; norms and biases have none
    grad_clip: float  # global L2 norm; 0 turns clipping off
    dtype: torch.dtype  # of parameters and activations; gradients and master weights are float32
    micro_batch_size: int
    zero_stage: int = 3  # 0 divides nothing over the data-parallel ranks; 1 optimizer state, 2 gradients, 3 parameters
    # Stage 3: parameters are whole for the rollout, from the rollout to the optimizer step, or layer by layer.
    hold_parameters: Literal["rollout", "step", "none"] = "rollout"


@dataclass(frozen=True)
class Update:
    """What an optimizer step did."""

    grad_norm: float  # global, before clipping; inf when a gradient was not finite
    applied: bool  # False: every rank skipped the step


@dataclass(frozen=True)
class SharedGradients:
    """Parameters of a stage whose gradient other ranks of the replica have a part in or a copy of."""

    partial: tuple[nn.Parameter, ...]  # each tensor-parallel rank has a share
    tied: tuple[nn.Parameter, ...]  # the other end of the pipeline has a share
    uncounted: tuple[nn.Parameter, ...]  # another rank counts them in sums over the replica

    @classmethod
    def of(cls, module: nn.Module, roles: Mapping[str, ParameterRole], tensor_parallel_rank: int) -> "SharedGradients":
        """Sort a module's parameters; one without a role is whole on every tensor-parallel rank."""
        named = [(parameter, roles.get(name, ParameterRole())) for name, parameter in module.named_parameters()]
        return cls(
            partial=tuple(parameter for parameter, role in named if role.partial_gradient),
            tied=tuple(parameter for parameter, role in named if role.tied),
            uncounted=tuple(parameter for parameter, role in named if not role.is_counted(tensor_parallel_rank)),
        )


def sum_over(group: dist.ProcessGroup, tensors: Sequence[Tensor]) -> None:
    """Add up tensors of equal shapes over a group, in place.

    Communication: one all-reduce of all tensors together; none for no tensors or a group of one.
    """
    if not tensors or dist.get_world_size(group) == 1:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay; norms and biases without.

    Raises:
        ValueError: one of both is missing; stages with different numbers of groups would wait for each other.
    """
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in module.parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # partitioned parameters look empty
        (matrices if len(shape) > 1 else vectors).append(parameter)
    if not matrices or not vectors:
        raise ValueError(f"a stage has {len(matrices)} matrices and {len(vectors)} vectors; it needs some of both")
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
