"""Check that inputs are the same on every rank, and give results of rank 0 to all ranks."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

from ebft_mega.errors import InputError, Problem

T = TypeVar("T")


def require_agreement(texts: Mapping[str, str]) -> None:
    """Compare texts over all ranks: machines may hold different copies of what should be one file.

    Args:
        texts: what to compare, by its name; the same names on every rank.
    Raises:
        InputError: on every rank, with the ranks of each version of each text that differs.
    Communication: one gathering of the texts over the world.
    """
    found: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(found, dict(texts))
    problems = []
    for key in texts:
        ranks: defaultdict[str, list[int]] = defaultdict(list)
        for rank, of_rank in enumerate(found):
            ranks[of_rank[key]].append(rank)
        if len(ranks) > 1:
            versions = "; ".join(f"ranks {', '.join(map(str, members))}: {text}" for text, members in ranks.items())
            problems.append(Problem("all ranks", key, versions, "the same on every rank"))
    if problems:
        raise InputError(problems)


def from_first_rank(compute: Callable[[], T]) -> T:
    """Call a function on rank 0 and return its result on every rank.

    Raises:
        Exception: on every rank, what it raises there.
    Communication: one broadcast of the result over the world.
    """
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [(compute(), None)]
        except Exception as error:
            answer = [(None, error)]
    dist.broadcast_object_list(answer, src=0)
    result, failure = answer[0]
    if failure is not None:
        raise failure
    return result
