"""The optimizer as both engines use it: settings, AdamW, result of a step, shared gradients and weight-decay groups."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from ebft_mega.config.schema import RunConfig
from ebft_mega.parallel.optimizer_state import prepare_moments
from ebft_mega.parallel.roles import ParameterRole
from ebft_mega.types import DTYPES

# AdamW updates this many elements at a time (`planning/memory.py` counts its temporaries).
UPDATE_ELEMENTS = 2**22


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of AdamW, and of how parameters, gradients and optimizer state are stored."""

    betas: tuple[float, float]
    weight_decay: float  # on matrices; norms and biases have none
    grad_clip: float  # global L2 norm; 0 turns clipping off
    dtype: torch.dtype  # of parameters and activations; gradients and master weights are float32
    micro_batch_size: int
    zero_stage: int = 3  # 0 divides nothing over the data-parallel ranks; 1 optimizer state, 2 gradients, 3 parameters
    # Stage 3: parameters are whole for the rollout, from the rollout to the optimizer step, or layer by layer.
    hold_parameters: Literal["rollout", "step", "none"] = "rollout"

    @property
    def clips_squares(self) -> bool:
        """Whether every gradient that AdamW gets has been clipped to one whose square is finite in float32."""
        return 0 < self.grad_clip**2 <= torch.finfo(torch.float32).max

    @classmethod
    def of(cls, config: RunConfig) -> "OptimizerSettings":
        """Settings that a run's configuration asks for."""
        return cls(
            betas=config.train.betas,
            weight_decay=config.train.weight_decay,
            grad_clip=config.train.grad_clip,
            dtype=DTYPES[config.train.dtype],
            micro_batch_size=config.train.micro_batch_size,
            zero_stage=config.zero.stage,
            hold_parameters=config.zero.hold_parameters,
        )


class SlicedAdamW(torch.optim.AdamW):
    """torch's AdamW, a slice of its tensors at a time, so that its temporaries are as small as a slice.

    torch's own step makes up to two more tensors of the size of what it updates: of one tensor on a CPU, of all of them
    on a GPU. DeepSpeed's optimizers step on one tensor for all matrices of a rank. Every operation of AdamW is on
    elements, so no bit of the result depends on the slices.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient; moments that are missing begin at zero.

        Args:
            closure: None; there is none in this package.
        """
        assert closure is None, "the loss is computed before the step"
        for group in self.param_groups:
            stepped = [parameter for parameter in group["params"] if parameter.grad is not None]
            prepare_moments(self, [parameter for parameter in stepped if not self.state[parameter]], 0)
            flat = [_flat_state(parameter, self.state[parameter]) for parameter in stepped]
            counts = [self.state[parameter]["step"] for parameter in stepped]
            for chunk in _chunks([tensors[0].numel() for tensors in flat]):
                slices = [[tensor[start:stop] for tensor in flat[index]] for index, start, stop in chunk]
                weights, gradients, averages, squares = map(list, zip(*slices, strict=True))
                adamw(
                    weights,
                    gradients,
                    averages,
                    squares,
                    [],
                    [counts[index].clone() for index, _, _ in chunk],  # each call counts its own update
                    foreach=group["foreach"],
                    amsgrad=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )
            for count in counts:
                count += 1


def _flat_state(parameter: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Views: a parameter, its gradient and its moments as one row of numbers each."""
    assert parameter.grad is not None, "only parameters with a gradient are updated"
    return tuple(tensor.view(-1) for tensor in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]))


def _chunks(sizes: Sequence[int]) -> Iterator[list[tuple[int, int, int]]]:
    """Divide tensors of given sizes into chunks of at most `UPDATE_ELEMENTS`: (tensor, first element, end) each."""
    chunk: list[tuple[int, int, int]] = []
    room = UPDATE_ELEMENTS
    for index, size in enumerate(sizes):
        start = 0
        while start < size:
            stop = min(size, start + room)
            chunk.append((index, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield chunk
                chunk, room = [], UPDATE_ELEMENTS
    if chunk:
        yield chunk


@dataclass(frozen=True)
class Update:
    """Result of an optimizer step."""

    grad_norm: float  # global, before clipping; inf when a gradient was not finite
    applied: bool  # False: every rank skipped the step


@dataclass(frozen=True)
class SharedGradients:
    """Parameters of a stage whose gradient is shared with other ranks of the replica."""

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


def has_finite_squares(gradient: Tensor) -> Tensor:
    """Whether AdamW's second moment can hold the squares of a gradient: bool [], on its device.

    An infinite moment would never be finite again, and its weights never move. No second tensor is made.
    """
    if not gradient.numel():
        return torch.ones((), dtype=torch.bool, device=gradient.device)
    return torch.stack(torch.aminmax(gradient)).square().isfinite().all()


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


def parameter_groups(
    module: nn.Module, shapes: Mapping[str, tuple[int, ...]], weight_decay: float
) -> list[dict[str, Any]]:
    """Split a module's parameters into matrices, with weight decay, and norms and biases, without.

    Args:
        shapes: of the whole parameters, by name: partitioned ones look empty.
    Raises:
        ValueError: one of both is missing; stages with different numbers of groups would wait for each other.
    """
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        (matrices if len(shapes[name]) > 1 else vectors).append(parameter)
    if not matrices or not vectors:
        raise ValueError(f"a stage has {len(matrices)} matrices and {len(vectors)} vectors; it needs some of both")
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
