"""Sums over replicas have the same bits on all stages, whose numbers of channels differ: one copy is saved for all."""

import torch
import torch.distributed as dist
from torch import Tensor

from ebft_mega.critic.ridge import Statistics
from ebft_mega.parallel.groups import connect
from tests.distributed.ranks import run_ranks

LENGTH, REGRESSORS, CHANNELS = 4, 5, (0, 64, 1024)


def squares_beside(channels: tuple[int, ...]) -> list[Tensor]:
    """The same squares of this replica, summed over all of them beside products of so many channels."""
    connect()
    generator = torch.Generator().manual_seed(dist.get_rank())
    squares = torch.randn(LENGTH, REGRESSORS, REGRESSORS, generator=generator, dtype=torch.float64)
    found = []
    for size in channels:
        products = torch.ones(LENGTH, REGRESSORS, size, dtype=torch.float64)
        summed = Statistics(squares.clone(), products).over_replicas(dist.group.WORLD)
        assert torch.equal(summed.products, torch.full_like(products, dist.get_world_size()))
        found.append(summed.squares)
    return found


def test_squares_do_not_depend_on_the_channels_beside_them():
    """With three replicas: a sum of two has one order. Reduced in one tensor with the products they differ."""
    for found in run_ranks(3, squares_beside, CHANNELS):
        assert all(torch.equal(each, found[0]) for each in found)
