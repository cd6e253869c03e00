"""Hidden states between layers: where positions lie among sequence-parallel ranks, and picking some of them."""

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
    """What hidden states look like where they enter and leave a stage."""

    hidden_size: int
    sequence_shards: int  # tensor-parallel ranks that hold parts of the sequence; 1 without sequence parallelism
    dtype: torch.dtype
    device: torch.device

    def padded(self, length: int) -> int:
        """Positions of a pass of `length`, filled up so that all shards are equal."""
        return -(-length // self.sequence_shards) * self.sequence_shards

    def order(self, pieces: Sequence[int]) -> Tensor | None:
        """Where the positions of consecutive passes lie when each shard has its parts of all of them behind each other.

        Args:
            pieces: positions of each pass, without filler.
        Returns:
            int64 [sum of pieces]; None if they just follow each other.
        """
        if self.sequence_shards == 1:
            return None
        widths = [self.padded(piece) // self.sequence_shards for piece in pieces]
        starts = itertools.accumulate(widths, initial=0)
        places = []
        for piece, width, start in zip(pieces, widths, starts, strict=False):
            offset = torch.arange(piece, device=self.device)
            places.append(offset // width * sum(widths) + start + offset % width)
        return torch.cat(places)

    def in_sequence(self, values: Tensor, pieces: Sequence[int]) -> Tensor:
        """Values of the positions of consecutive passes at their places in that order, zero for filler.

        Args:
            values: [sum of pieces, ...]; pieces: as in `order`.
        Returns:
            [sum of padded pieces, ...].
        """
        others = (0, 0) * (values.dim() - 1)
        padded = [F.pad(part, (*others, 0, self.padded(len(part)) - len(part))) for part in values.split(list(pieces))]
        by_shard = [part.unflatten(0, (self.sequence_shards, -1)) for part in padded]
        return torch.cat(by_shard, dim=1).flatten(0, 1)

    def empty(self, length: int, rows: int) -> Tensor:
        """A buffer for this rank's part of a pass of `length` positions: [S, rows, H]."""
        shape = (self.padded(length) // self.sequence_shards, rows, self.hidden_size)
        return torch.empty(shape, dtype=self.dtype, device=self.device)


def select_positions(hidden: Tensor, positions: Tensor, shards: int, groups: ProcessGroups) -> Tensor:
    """Some positions of a pass, every tensor-parallel rank with its slice of the hidden dimension.

    Args:
        hidden: as `Stage.hidden_states` returned them, [S / shards, B, H]; without gradient.
        positions: int64 [N], of the whole sequence.
        shards: `HiddenShape.sequence_shards`.
    Returns:
        [N, B, H / tensor-parallel ranks].
    Communication: none, or with sequence parallelism one all-to-all, in which N * B * H values are exchanged from
        slices of the sequence to slices of the hidden dimension.
    """
    ranks, rank = groups.tensor_parallel_size, groups.tensor_parallel_rank
    if shards == 1:
        width = hidden.shape[-1] // ranks
        return hidden[..., rank * width : (rank + 1) * width][positions]
    length = hidden.shape[0]
    owner = positions // length
    here = hidden[positions[owner == rank] - rank * length]  # [own N, B, H]
    sent = here.unflatten(-1, (ranks, -1)).movedim(-2, 0).contiguous()  # [ranks, own N, B, H / ranks]
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
