"""A collective that one rank never joins fails on the others by the timeout, in the world and in a smaller group."""

import datetime
import time

import pytest
import torch
import torch.distributed as dist

from ebft_mega.parallel.groups import connect, make_process_groups
from tests.distributed.ranks import run_ranks

TIMEOUT = datetime.timedelta(seconds=2)
SECONDS_TO_STAY_AWAY = 10


def wait_alone():
    """Seconds until the first rank gives up on sums that the second one never joins."""
    groups = make_process_groups(connect(TIMEOUT), timeout=TIMEOUT)
    if dist.get_rank() == 1:
        time.sleep(SECONDS_TO_STAY_AWAY)
        return None
    seconds = []
    for group in (None, groups.data_parallel):
        started = time.monotonic()
        with pytest.raises(RuntimeError, match=r"(?i)timed? ?out"):
            dist.all_reduce(torch.ones(1), group=group)
        seconds.append(time.monotonic() - started)
    return seconds


@pytest.mark.slow
def test_collectives_give_up():
    assert all(1.5 < seconds < 4.5 for seconds in run_ranks(2, wait_alone)[0])
