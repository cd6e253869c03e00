"""A value or an error of one rank reaches all ranks."""

import torch.distributed as dist

from ebft_mega.errors import InputError, Problem
from ebft_mega.parallel.groups import connect
from ebft_mega.runtime.agreement import from_first_rank
from tests.distributed.ranks import run_ranks


def refuse():
    raise InputError([Problem("a file", "key", "this", "that")])


def hear():
    connect()
    value = from_first_rank(dist.get_rank)
    try:
        from_first_rank(refuse)
    except InputError as error:
        return value, str(error)
    return value, None


def test_result_and_error_of_the_first_rank_reach_all():
    assert run_ranks(2, hear) == [(0, "a file: key: found this; expected that")] * 2
