"""The float32 weights and optimizer moments of a stage, and which rank writes which of them."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

StateKind = str  # `WEIGHTS`, or the name of one of the optimizer's moments
WEIGHTS: StateKind = "weights"  # float32 master weights
COUNT = "step"  # where torch's optimizers count their updates, among the state of a tensor
# read(kind, parameter name): this (tensor, pipeline) coordinate's whole slice of a parameter's state, float32.
StateReader = Callable[[StateKind, str], Tensor]


def share_out(sizes: Sequence[int], num_ranks: int) -> list[int]:
    """Divide items of given sizes evenly among ranks: the largest first, each to the rank that has least so far.

    Returns:
        A rank per item, the same on every rank. No rank has more than its equal share and one item.
    """
    loads = [0] * num_ranks
    owners = [0] * len(sizes)
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        owners[item] = loads.index(min(loads))
        loads[owners[item]] += sizes[item]
    return owners


def prepare_moments(
    optimizer: torch.optim.Optimizer, moments: Sequence[str], tensors: Iterable[Tensor], applied_updates: int
) -> None:
    """Make the state that an optimizer keeps for tensors, with a given count of updates; missing moments are zero.

    It is made in the first step, so before it there is nothing to put saved moments into. The format is that of torch's
    AdamW: a step count of its own for each tensor (incremented in place), on the CPU.

    Args:
        moments: their names.
        tensors: what the optimizer steps on.
    """
    for tensor in tensors:
        state = optimizer.state[tensor]
        for kind in moments:
            if kind not in state:
                state[kind] = torch.zeros_like(tensor, memory_format=torch.preserve_format, requires_grad=False)
        state[COUNT] = torch.tensor(float(applied_updates), dtype=torch.float32)


def applied_updates(optimizer: torch.optim.Optimizer, tensors: Iterable[Tensor]) -> int:
    """Read from an optimizer's state how often it has been applied; skipped steps do not count."""
    counts = {int(state[COUNT]) if (state := optimizer.state.get(tensor)) else 0 for tensor in tensors}
    assert len(counts) == 1, f"all parameters of a stage are updated at once, but the optimizer counts {counts} updates"
    return counts.pop()
