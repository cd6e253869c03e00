"""A collective whose other rank has ended fails with words by which it is recognised."""

import torch
import torch.distributed as dist

from ebft_mega.parallel.groups import connect
from ebft_mega.parallel.lost_peers import is_lost_connection
from tests.distributed.ranks import run_ranks


def reduce_with_one_that_has_ended() -> bool | None:
    connect()
    dist.barrier()
    if dist.get_rank() == 1:
        return None
    try:
        for _ in range(1000):  # the first ones may still find it
            dist.all_reduce(torch.ones(1))
    except RuntimeError as error:
        return is_lost_connection(error)
    return False


def test_gloo_says_that_a_peer_has_ended():
    assert run_ranks(2, reduce_with_one_that_has_ended) == [True, None]
