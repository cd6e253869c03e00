"""Shape of hidden states between layers, their order over sequence-parallel ranks, and selecting some positions."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ebft_mega.parallel.groups import ProcessGroups


@dataclass(frozen=True)
class HiddenShape:
    """Shape, dtype and device of the hidden states that enter and leave a stage."""

    hidden_size: int
    sequence_shards: int  # tensor-parallel ranks that hold parts of the sequence; 1 without sequence parallelism
    dtype: torch.dtype
    device: torch.device

    def padded(self, length: int) -> int:
        """Positions of a pass of `length`, filled up so that all shards are equal."""
        return -(-length // self.sequence_shards) * self.sequence_shards

    def order(self, pass_lengths: Sequence[int]) -> Tensor | None:
        """Index of each position of consecutive passes, where each shard concatenates its parts of all passes.

        Args:
            pass_lengths: positions of each pass, without filler.
        Returns:
            int64 [sum of pass lengths]; None if the index is the position.
        """
        if self.sequence_shards == 1:
            return None
        widths = [self.padded(length) // self.sequence_shards for length in pass_lengths]
        starts = itertools.accumulate(widths, initial=0)
        places = []
        for length, width, start in zip(pass_lengths, widths, starts, strict=False):
            offset = torch.arange(length, device=self.device)
            places.append(offset // width * sum(widths) + start + offset % width)
        return torch.cat(places)

    def in_sequence(self, values: Tensor, pass_lengths: Sequence[int]) -> Tensor:
        """Values of the positions of consecutive passes at their places in that order, zero for filler.

        Args:
            values: [sum of pass lengths, ...]; pass_lengths: as in `order`.
        Returns:
            [sum of padded lengths, ...].
        """
        others = (0, 0) * (values.dim() - 1)
        padded = [
            F.pad(part, (*others, 0, self.padded(len(part)) - len(part))) for part in values.split(list(pass_lengths))
        ]
        by_shard = [part.unflatten(0, (self.sequence_shards, -1)) for part in padded]
        return torch.cat(by_shard, dim=1).flatten(0, 1)

    def empty(self, length: int) -> Tensor:
        """A buffer for this rank's part of a pass of `length` positions: [S, 1, H]."""
        shape = (self.padded(length) // self.sequence_shards, 1, self.hidden_size)
        return torch.empty(shape, dtype=self.dtype, device=self.device)


def select_positions(hidden: Tensor, positions: Tensor, shards: int, groups: ProcessGroups) -> Tensor:
    """Some positions of a pass, every tensor-parallel rank with its slice of the hidden dimension.

    Args:
        hidden: as `Stage.hidden_states` returned them, [S / shards, 1, H]; without gradient.
        positions: int64 [N], of the whole sequence.
        shards: `HiddenShape.sequence_shards`.
    Returns:
        [N, 1, H / tensor-parallel ranks].
    Communication: none, or with sequence parallelism one all-to-all, in which N * H values are exchanged from
        slices of the sequence to slices of the hidden dimension.
    """
    ranks, rank = groups.tensor_parallel_size, groups.tensor_parallel_rank
    if shards == 1:
        width = hidden.shape[-1] // ranks
        return hidden[..., rank * width : (rank + 1) * width][positions]
    length = hidden.shape[0]
    owner = positions // length
    here = hidden[positions[owner == rank] - rank * length]  # [own N, 1, H]
    sent = here.unflatten(-1, (ranks, -1)).movedim(-2, 0).contiguous()  # [ranks, own N, 1, H / ranks]
    received = hidden.new_empty((positions.numel(), *sent.shape[2:]))
    counts = torch.bincount(owner, minlength=ranks).tolist()
    dist.all_to_all_single(
        received,
        sent.flatten(0, 1),
        output_split_sizes=counts,
        input_split_sizes=[counts[rank]] * ranks,
        group=groups.tensor_parallel,
    )
    # Received rank by rank; put back into the order of `positions`.
    selected = torch.empty_like(received)
    selected[owner.argsort(stable=True)] = received
    return selected
