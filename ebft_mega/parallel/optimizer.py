"""The optimizer as both engines use it: settings, slices, result of a step, shared gradients, weight-decay groups."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ebft_mega.config.entries import optimizer
from ebft_mega.config.schema import RunConfig
from ebft_mega.extension.entry_fault import line_within
from ebft_mega.extension.update_rule import Optimizer, UpdateSettings, UpdateSlice
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.parallel.optimizer_state import COUNT, WEIGHTS, StateKind, prepare_moments
from ebft_mega.parallel.roles import ParameterRole
from ebft_mega.registry.kinds import OPTIMIZERS
from ebft_mega.types import DTYPES

logger = logging.getLogger(__name__)

# An optimizer updates this many elements at a time (`planning/memory.py` counts its temporaries).
UPDATE_ELEMENTS = 2**22


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer with its settings, and how parameters, gradients and optimizer state are stored."""

    betas: tuple[float, float]
    weight_decay: float  # on matrices; norms and biases have none
    grad_clip: float  # global L2 norm; 0 turns clipping off
    dtype: torch.dtype  # of parameters and activations; gradients and master weights are float32
    micro_batch_size: int
    zero_stage: int = 3  # 0 divides nothing over the data-parallel ranks; 1 optimizer state, 2 gradients, 3 parameters
    # Stage 3: parameters are whole for the rollout, from the rollout to the optimizer step, or layer by layer.
    hold_parameters: Literal["rollout", "step", "none"] = "rollout"
    rule: Optimizer = field(kw_only=True)
    is_checked: bool = field(default=False, kw_only=True)  # whether what the rule does to its slices is looked at
    place: str = field(default="configuration", kw_only=True)  # where `train.optimizer` was written

    @property
    def state_kinds(self) -> tuple[StateKind, ...]:
        """What is stored in float32 for every parameter: master weights, then the optimizer's moments."""
        return (WEIGHTS, *self.rule.moments)

    @property
    def clips_squares(self) -> bool:
        """Whether every gradient that the optimizer gets has been clipped to one whose square is finite in float32."""
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
            rule=optimizer(config),
            is_checked=config.train.optimizer not in OPTIMIZERS.own_names(),
            place=config.place("train.optimizer"),
        )


@dataclass(frozen=True)
class Fault:
    """What an optimizer has done that its contract rules out."""

    found: str
    expected: str


class SlicedOptimizer(torch.optim.Optimizer):
    """An optimizer of the registry, as torch and DeepSpeed know optimizers; it updates a slice of tensors at a time.

    Its temporaries are then as small as a slice. torch's own optimizers make some of the size of what they update: of
    one tensor on a CPU, of all of them on a GPU; and DeepSpeed has one tensor for all matrices of a rank. No bit of the
    result depends on the slices, because an update is element by element.
    """

    def __init__(self, groups: list[dict[str, Any]], settings: OptimizerSettings) -> None:
        """Args: groups: of parameters, each with its `weight_decay`; the learning rate is set before every step."""
        super().__init__(groups, {"lr": 0.0, "betas": settings.betas, "weight_decay": 0.0})
        self._rule, self._is_checked = settings.rule, settings.is_checked
        self.fault: Fault | None = None  # the first that was found; nothing is updated after it

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient; moments that are missing begin at zero.

        Args:
            closure: None; there is none in this package.
        """
        assert closure is None, "the loss is computed before the step"
        for group in self.param_groups:
            stepped = [parameter for parameter in group["params"] if parameter.grad is not None]
            fresh = [parameter for parameter in stepped if not self.state[parameter]]
            prepare_moments(self, self._rule.moments, fresh, 0)
            settings = UpdateSettings(group["lr"], group["weight_decay"], group["betas"])
            counts = [int(self.state[parameter][COUNT]) for parameter in stepped]
            for updates in sorted(set(counts)):
                alike = [each for each, count in zip(stepped, counts, strict=True) if count == updates]
                for chunk in _chunks([parameter.numel() for parameter in alike]):
                    slices = [self._slice(alike[index], start, stop) for index, start, stop in chunk]
                    self._update(slices, updates, settings)
            for parameter in stepped:
                self.state[parameter][COUNT] += 1

    def _slice(self, parameter: Tensor, start: int, stop: int) -> UpdateSlice:
        """Views of a row of elements of a parameter, its gradient and its moments."""
        assert parameter.grad is not None, "only parameters with a gradient are updated"
        state = self.state[parameter]
        moments = tuple(state[kind].view(-1)[start:stop] for kind in self._rule.moments)
        return UpdateSlice(parameter.view(-1)[start:stop], parameter.grad.view(-1)[start:stop], moments)

    def _update(self, slices: Sequence[UpdateSlice], updates: int, settings: UpdateSettings) -> None:
        if not self._is_checked:
            self._rule.update(slices, updates, settings)
            return
        if self.fault is not None:
            return
        stored = [[_storage(tensor) for tensor in _stored(each)] for each in slices]
        try:
            self._rule.update(slices, updates, settings)
        except torch.OutOfMemoryError:
            raise
        except (Exception, SystemExit) as error:  # of a plugin's code: the other ranks have to be told
            logger.debug("the optimizer %s failed", self._rule.name, exc_info=error)
            line = line_within(type(self._rule), error)
            raised = f"{type(error).__name__}: {error}" + (f" in line {line}" if line else "")
            self.fault = Fault(f"an update that raises {raised}", "weights and moments in place")
            return
        for each, before in zip(slices, stored, strict=True):
            self.fault = self.fault or self._fault_of(each, before)

    def _fault_of(self, part: UpdateSlice, before: list[tuple[object, ...]]) -> Fault | None:
        """What is wrong with a slice after an update; `before`: the storage of its tensors before it."""
        for name, tensor, storage in zip((WEIGHTS, *self._rule.moments), _stored(part), before, strict=True):
            if _storage(tensor) != storage:
                found = f"{name} of {tensor.dtype} and shape {list(tensor.shape)} somewhere else after an update"
                return Fault(found, f"{storage[1]} and shape {storage[2]}, changed in place")
            if not tensor.isfinite().all():
                return Fault(f"{name} that are not finite after an update", "finite numbers, as the gradients are")
        return None


def _stored(part: UpdateSlice) -> tuple[Tensor, ...]:
    return (part.weights, *part.moments)


def _storage(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, list(tensor.shape)


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


@dataclass(frozen=True)
class GradientPart:
    """Elements of a parameter's gradient, of those that one rank shows."""

    parameter: str  # name in `named_parameters()`
    start: int  # of the first one, in the whole flattened parameter of this tensor-parallel rank
    values: Tensor  # float32 [elements], to read: the engine's own storage


# What an engine shows the reduced gradient to, before it is clipped: every element on one data-parallel rank.
LookAtGradient = Callable[[Iterable[GradientPart]], None]


def share_of(whole: Tensor, groups: ProcessGroups) -> tuple[int, Tensor]:
    """What a data-parallel rank shows of a tensor that all of them hold: where it begins, and its elements (a view)."""
    size = -(-whole.numel() // groups.data_parallel_size)
    start = min(groups.data_parallel_rank * size, whole.numel())
    return start, whole.view(-1)[start : start + size]


def has_finite_squares(gradient: Tensor) -> Tensor:
    """Whether a second moment, such as AdamW's, can hold the squares of a gradient: bool [], on its device.

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
