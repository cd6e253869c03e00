"""Where DeepSpeed's ZeRO optimizers store gradients, master weights and moments, as tensors to read and to write."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ebft_mega.parallel.deepspeed_adapter.partitioned_parameters import whole_shape
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.parallel.optimizer import GradientPart, OptimizerSettings, share_of
from ebft_mega.parallel.optimizer_state import WEIGHTS, StateKind, applied_updates, prepare_moments


class OptimizerStorage:
    """The storage of one of DeepSpeed's optimizers; there is one for each of stages 1 to 3, with names of its own."""

    def __init__(self, optimizer: Any, settings: OptimizerSettings, groups: ProcessGroups) -> None:
        """Find where the parameters are; `optimizer` is the engine's."""
        self._optimizer = optimizer
        self._zero_stage, self._moments = settings.zero_stage, settings.rule.moments
        self._groups = groups
        # DeepSpeed's stage 1 in bfloat16 is another optimizer, with a whole float32 gradient on every rank.
        self._whole_gradients = settings.zero_stage == 1 and settings.dtype == torch.bfloat16
        self._places = {
            parameter: (group, index)
            for group, parameters in enumerate(self.sub_groups())
            for index, parameter in enumerate(parameters)
        }
        if self._zero_stage == 3:
            # A step would begin with a copy of all gradients.
            optimizer.flatten = functools.partial(end_to_end, flatten=optimizer.flatten)

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """Every parameter that the optimizer steps on."""
        return list(self._places)

    @property
    def has_aligned_gradients(self) -> bool:
        """Whether all ranks with a parameter have the same elements of its gradient.

        Stages 1 and 2 otherwise cut a stage's parameters end to end, so what a rank has of one depends on the others.
        """
        return self._zero_stage == 3 or self._whole_gradients

    def sub_groups(self) -> Sequence[Sequence[nn.Parameter]]:
        """The optimizer's groups of parameters, each of which it steps on at once."""
        groups: Sequence[Sequence[nn.Parameter]]
        if self._whole_gradients:
            groups = self._optimizer.bf16_groups
        else:
            groups = self._optimizer.fp16_groups if self._zero_stage == 3 else self._optimizer.bit16_groups
        return groups

    def gradient(self, parameter: Any) -> Tensor | None:
        """This data-parallel rank's partition of a reduced gradient, float32; None: it has none of the parameter."""
        group, index = self._places[parameter]
        gradient: Tensor
        if self._whole_gradients:
            gradient = self._optimizer.fp32_groups_gradients[group][index]
        elif self._zero_stage == 3:
            gradient = self._optimizer.averaged_gradients[group][index]
        elif (mapping := parameter._hp_mapping) is not None:
            gradient = mapping.get_lp_grad_fragment(parameter._index_in_param_group)
        else:
            return None
        return gradient

    def gradients(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        """This rank's partitions of reduced gradients, the optimizer's own storage; none for what it has no part of."""
        found = (self.gradient(parameter) for parameter in parameters)
        return [gradient for gradient in found if gradient is not None]

    def shown_gradients(self, module: nn.Module) -> Iterator[GradientPart]:
        """What this data-parallel rank shows of the reduced gradient of a stage.

        Returns:
            The optimizer's own storage, without padding; all ranks' together are the gradient, each element once.
        """
        for name, parameter in module.named_parameters():
            if (shown := self._shown(parameter)) is not None:
                yield GradientPart(name, *shown)

    def _shown(self, parameter: Any) -> tuple[int, Tensor] | None:
        """Where in the parameter what this rank shows begins, and its elements; None: it shows none of it."""
        gradient = self.gradient(parameter)
        if gradient is None:
            return None
        if self._whole_gradients:
            return share_of(gradient, self._groups)
        if self._zero_stage < 3:
            return parameter._hp_mapping.lp_fragment_address.start, gradient
        start = self._groups.data_parallel_rank * gradient.numel()
        return start, gradient[: max(0, math.prod(whole_shape(parameter)) - start)]

    def forget_gradients(self) -> None:
        """Zero the buffer of gradient partitions, which stages 1 and 2 do by themselves.

        At stage 3 a step's first micro-batch is copied there and the others are added, but nothing clears it: a
        parameter without gradient in the first micro-batch would add to the last step's gradient.
        """
        if self._zero_stage == 3:
            self._optimizer.grad_partitions_flat_buffer.zero_()

    @property
    def applied_updates(self) -> int:
        """How often the optimizer has been applied; skipped steps do not count."""
        return applied_updates(self._optimizer.optimizer, self._flat_partitions())

    def prepare_moments(self, applied_updates: int) -> None:
        """Make the optimizer's state where there is none yet, and set its count of updates."""
        prepare_moments(self._optimizer.optimizer, self._moments, self._flat_partitions(), applied_updates)

    def set_state(self, kind: StateKind, parameter: nn.Parameter, value: Tensor) -> None:
        """Overwrite this rank's partition of a parameter's master weight or moment.

        Args:
            value: the whole parameter's, float32.
        """
        if self._zero_stage == 3:
            set_partition(kind, parameter, value, self._groups.data_parallel_rank)
        elif (found := self._fragment(kind, parameter)) is not None:
            fragment, start = found
            fragment.copy_(value.flatten()[start : start + len(fragment)])

    def whole_state(self, kind: StateKind, parameter: Any) -> Tensor:
        """A parameter's whole master weight or moment, float32, a new tensor on every rank.

        Communication: that of `ZeroEngine.state_tensors`.
        """
        if kind != WEIGHTS and self.applied_updates == 0:
            # They are made in the first step.
            return torch.zeros(whole_shape(parameter), dtype=torch.float32, device=self._groups.device)
        if self._zero_stage < 3:
            found = self._fragment(kind, parameter)
            return whole_of_fragments(parameter, found, self._groups.data_parallel)
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        whole: Tensor
        if kind == WEIGHTS:
            whole = safe_get_full_fp32_param(parameter)
        else:
            whole = safe_get_full_optimizer_state(parameter, kind)
        return whole

    def _fragment(self, kind: StateKind, parameter: Any) -> tuple[Tensor, int] | None:
        """This rank's part of a parameter's master weight or moment below stage 3, and where in it the part begins.

        The optimizer's own storage. DeepSpeed's functions find moments through links, which it makes after the first
        group's first step: the parameters of all other groups are left without.
        """
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = self._flat_partitions()[self._places[parameter][0]]
        if kind != WEIGHTS:
            flat = self._optimizer.optimizer.state[flat][kind]
        address = mapping.hp_fragment_address
        return flat.detach().narrow(0, address.start, address.numel), mapping.lp_fragment_address.start

    def _flat_partitions(self) -> Sequence[Tensor]:
        """What the optimizer steps on: this rank's float32 partition of each group of parameters."""
        partitions: Sequence[Tensor]
        if self._whole_gradients:
            partitions = self._optimizer.fp32_groups_flat_partition
        elif self._zero_stage == 3:
            partitions = self._optimizer.fp32_partitioned_groups_flat
        else:
            partitions = self._optimizer.single_partition_of_fp32_groups
        return partitions


def end_to_end(tensors: Sequence[Tensor], flatten: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
    """Give tensors as one row of numbers, without a copy where they lie in memory like that.

    Args:
        flatten: makes the copy.
    """
    first = tensors[0]
    start = end = first.data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != end or tensor.dtype != first.dtype or not tensor.is_contiguous():
            return flatten(tensors)
        end += tensor.numel() * tensor.element_size()
    size = (end - start) // first.element_size()
    if first.storage_offset() * first.element_size() + end - start > first.untyped_storage().nbytes():
        return flatten(tensors)  # neighbours by chance
    return first.detach().as_strided((size,), (1,))


def whole_of_fragments(parameter: Tensor, own: tuple[Tensor, int] | None, group: dist.ProcessGroup) -> Tensor:
    """Join the ranks' fragments of a parameter's master weight or moment, bit for bit.

    DeepSpeed's own function adds fragments up as numbers, which makes a positive zero of a negative one; here their
    bits are added to bits that are not set anywhere else.

    Args:
        own: this rank's fragment, float32, and where it begins; None: it has none.
    Communication: one all-reduce of 4 bytes per element.
    """
    bits = torch.zeros(parameter.numel(), dtype=torch.int32, device=parameter.device)
    if own is not None:
        fragment, start = own
        bits[start : start + len(fragment)] = fragment.view(torch.int32)
    dist.all_reduce(bits, group=group)
    return bits.view(torch.float32).view_as(parameter)


def set_partition(kind: StateKind, parameter: Any, value: Tensor, data_parallel_rank: int) -> None:
    """Replace this rank's partition of a parameter's master weight or moment (stage 3).

    DeepSpeed's function for whole values fails on the last ranks where a parameter's elements do not divide evenly:
    their partitions are longer than what is left of it.

    Args:
        value: the whole parameter's, float32.
    """
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    size = parameter.ds_tensor.numel()
    part = value.flatten()[data_parallel_rank * size : (data_parallel_rank + 1) * size]
    part = F.pad(part, (0, size - len(part)))
    if kind == WEIGHTS:
        safe_set_local_fp32_param(parameter, part)
    else:
        safe_set_local_optimizer_state(parameter, part, kind)
