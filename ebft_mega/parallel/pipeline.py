"""Pipeline schedules: a continuous ring for decoding, 1F1B or a replayed backward pass for training.

What a stage computes is given as functions, so the schedules work for any kind of pass. A pipeline of one stage runs
the same loop without communication.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ebft_mega.parallel.groups import ProcessGroups


@dataclass(frozen=True)
class Slot:
    """One pass of one micro-batch through one stage."""

    micro_batch: int
    pass_index: int  # 0 is the document; pass t takes as input what pass t - 1 returned


def ring_slots(num_micro_batches: int, num_passes: int, num_stages: int) -> list[Slot | None]:
    """List the slots of the first stage, tick by tick; stage s is s ticks behind.

    Micro-batches take turns in groups of at least `num_stages`: the tokens of a pass come back from the last stage just
    when the first has sent every other member of the group ahead, and the next group follows at once. So the pipeline
    is not flushed between passes, and only a group's keys and values are in memory. A slot is idle (None) only if a
    group has fewer micro-batches than there are stages: never with `num_micro_batches >= num_stages`.

    Returns:
        `num_passes` slots per micro-batch, idle ones in between.
    """
    num_groups = max(1, num_micro_batches // num_stages)
    slots: list[Slot | None] = []
    for group in range(num_groups):
        members = range(
            group * num_micro_batches // num_groups,
            (group + 1) * num_micro_batches // num_groups,
        )
        idle = [None] * (num_stages - len(members))
        for pass_index in range(num_passes):
            slots.extend(Slot(member, pass_index) for member in members)
            slots.extend(idle)
    return slots


def run_ring(
    groups: ProcessGroups,
    num_micro_batches: int,
    run: Callable[[Slot, Tensor | None], Tensor],
    hidden_buffer: Callable[[Slot], Tensor],
    num_passes: int = 1,
    returned_buffer: Callable[[Slot], Tensor] | None = None,
    take_returned: Callable[[Slot, Tensor], None] | None = None,
) -> None:
    """Take every micro-batch through all stages `num_passes` times.

    In every tick all stages run one slot, then all send their results at once. In tick t stage s runs slot t - s.

    Args:
        run: one pass through this stage. Its input are the hidden states of the stage before; None on the first stage.
            It returns hidden states for the next stage; on the last stage what is returned to all stages (after the
            last pass nothing is).
        hidden_buffer: an empty tensor for the hidden states that enter this stage in a slot. Its size may depend on
            what was returned of the slots before.
        num_passes: 1 for a plain forward pass.
        returned_buffer: an empty tensor for what the last stage returns; needed for more than one pass.
        take_returned: called on every stage with a slot and what the last stage returned for it, before any stage runs
            the next pass of that micro-batch; needed for more than one pass.
    Communication: per slot one send to the next stage; from the last stage to every other in all but the last pass.
    """
    slots = ring_slots(num_micro_batches, num_passes, groups.pipeline_size)
    stage, last = groups.pipeline_rank, groups.pipeline_size - 1

    def at(tick: int, stage: int) -> Slot | None:
        index = tick - stage
        return slots[index] if 0 <= index < len(slots) else None

    hidden: Tensor | None = None
    for tick in range(len(slots) + last):
        slot = at(tick, stage)
        output = None if slot is None else run(slot, hidden)
        returning = at(tick, last)
        if returning is not None and returning.pass_index == num_passes - 1:
            returning = None
        returned = output if stage == last and returning is not None else None
        incoming = at(tick, stage - 1) if stage else None
        hidden = None if incoming is None else hidden_buffer(incoming)
        buffer = returned_buffer(returning) if returned_buffer and returning is not None and stage < last else None
        hand_over(
            groups,
            forward=output if stage < last else None,
            from_previous=hidden,
            to_all=returned,
            from_last=buffer,
        )
        if returning is not None and take_returned is not None:
            found = returned if stage == last else buffer
            assert found is not None, "the last stage returns something in all but the last pass"
            take_returned(returning, found)


def hand_over(
    groups: ProcessGroups,
    *,
    forward: Tensor | None = None,
    from_previous: Tensor | None = None,
    to_all: Tensor | None = None,
    from_last: Tensor | None = None,
    backward: Tensor | None = None,
    from_next: Tensor | None = None,
) -> None:
    """Send and receive at once whatever is not None; returns when the received tensors are filled.

    Communication: point to point within the pipeline, in one batch, so that two stages that send to each other
    cannot wait for each other; `to_all` is one message for each earlier stage.
    """
    group, stage, size = groups.pipeline_parallel, groups.pipeline_rank, groups.pipeline_size
    operations = []
    for operation, tensor, peers in (
        (dist.isend, forward, [stage + 1]),
        (dist.isend, backward, [stage - 1]),
        (dist.isend, to_all, range(size - 1)),
        (dist.irecv, from_previous, [stage - 1]),
        (dist.irecv, from_next, [stage + 1]),
        (dist.irecv, from_last, [size - 1]),
    ):
        if tensor is not None:
            tensor = tensor.detach().contiguous() if operation is dist.isend else tensor
            operations += [dist.P2POp(operation, tensor, group=group, group_peer=peer) for peer in peers]
    if operations:
        for request in dist.batch_isend_irecv(operations):
            request.wait()


def one_forward_one_backward(
    groups: ProcessGroups,
    num_micro_batches: int,
    forward: Callable[[int, Tensor | None], Tensor],
    backward: Callable[[Tensor, Tensor | None], None],
    hidden_buffer: Callable[[int], Tensor],
) -> None:
    """Compute the gradients of all micro-batches, with the activations of as few as possible in memory (1F1B).

    A stage has at most as many micro-batches in flight as there are stages from it to the end.

    Args:
        forward: (micro-batch, hidden states of the stage before or None) -> hidden states for the next stage, or
            on the last stage the scalar loss.
        backward: (what `forward` returned, gradient of it or None on the last stage) accumulates gradients; the
            received hidden states get theirs in `.grad`.
        hidden_buffer: an empty tensor for a micro-batch's hidden states at this stage's entry.
    Communication: per micro-batch the hidden states to the next stage and their gradient back.
    Source: the schedule is PipeDream-Flush (arXiv 2006.09503).
    """
    stage, last = groups.pipeline_rank, groups.pipeline_size - 1
    is_first_stage, is_last_stage = groups.is_first_stage, groups.is_last_stage
    in_flight: list[tuple[Tensor | None, Tensor]] = []

    def receive_buffer(index: int) -> Tensor | None:
        return None if is_first_stage or index >= num_micro_batches else hidden_buffer(index)

    def run_forward(index: int, received: Tensor | None) -> Tensor:
        if received is not None:
            received.requires_grad_()
        output = forward(index, received)
        in_flight.append((received, output))
        return output

    def run_backward(gradient: Tensor | None) -> Tensor | None:
        received, output = in_flight.pop(0)
        backward(output, gradient)
        return None if received is None else received.grad

    warm_up = min(last - stage, num_micro_batches)
    for index in range(warm_up):
        received = receive_buffer(index)
        hand_over(groups, from_previous=received)
        hand_over(groups, forward=run_forward(index, received))
    received = receive_buffer(warm_up)
    hand_over(groups, from_previous=received)
    for index in range(warm_up, num_micro_batches):
        output = run_forward(index, received)
        gradient = None if is_last_stage else torch.empty_like(in_flight[0][1])
        hand_over(groups, forward=None if is_last_stage else output, from_next=gradient)
        input_gradient = run_backward(gradient)
        received = receive_buffer(index + 1)
        hand_over(groups, backward=input_gradient, from_previous=received)
    for _ in range(warm_up):
        gradient = torch.empty_like(in_flight[0][1])
        hand_over(groups, from_next=gradient)
        hand_over(groups, backward=run_backward(gradient))


def replayed_backward(
    groups: ProcessGroups,
    num_micro_batches: int,
    forward: Callable[[int], Tensor],
    backward: Callable[[Tensor, Tensor | None], None],
    entering_gradient: Callable[[int], Tensor],
    release: Callable[[int], None],
) -> None:
    """Compute the gradients of all micro-batches whose forward pass every stage has saved: only gradients are sent.

    Each stage does forward, backward, forward, backward: the order that ZeRO-3's prefetching expects.

    Args:
        forward: micro-batch -> what its saved forward pass returned, or on the last stage the scalar loss.
        backward: (what `forward` returned, gradient of it or None on the last stage) accumulates gradients.
        entering_gradient: micro-batch -> after its backward pass, gradient of the hidden states that entered.
        release: frees a micro-batch's saved forward pass.
    Communication: per micro-batch the gradient of the hidden states from each stage to the one before.
    """
    for index in range(num_micro_batches):
        output = forward(index)
        gradient = None
        if not groups.is_last_stage:
            gradient = torch.empty(output.shape, dtype=output.dtype, device=output.device)
            hand_over(groups, from_next=gradient)
        backward(output, gradient)
        if not groups.is_first_stage:
            hand_over(groups, backward=entering_gradient(index))
        del output, gradient
        release(index)


def share_from_last_stage(
    tensors: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, groups: ProcessGroups
) -> list[Tensor]:
    """Copy what only the last stage computed to every stage.

    Args:
        tensors: on the last stage the values, elsewhere ignored.
        shapes, dtype: of the values.
    Communication: one broadcast along the pipeline, of all values together.
    """
    if groups.pipeline_size == 1:
        return list(tensors)
    sizes = [torch.Size(shape).numel() for shape in shapes]
    if groups.is_last_stage:
        flat = torch.cat([tensor.detach().to(dtype).flatten() for tensor in tensors])
    else:
        flat = torch.empty(sum(sizes), dtype=dtype, device=groups.device)
    dist.broadcast(flat, group=groups.pipeline_parallel, group_src=groups.pipeline_size - 1)
    return [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
