"""Check that inputs are the same on every rank, and give results of rank 0 to all ranks."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist

from ebft_mega.errors import InputError, Problem
from ebft_mega.runtime.exchange import all_gather_values, broadcast_message
from ebft_mega.runtime.message_text import from_message, to_message

T = TypeVar("T")


def require_agreement(texts: Mapping[str, str]) -> None:
    """Compare texts over all ranks: machines may hold different copies of what should be one file.

    Args:
        texts: what to compare, by its name; the same names on every rank.
    Raises:
        InputError: on every rank, with the ranks of each version of each text that differs.
    Communication: one gathering of the texts over the world.
    """
    found: list[dict[str, str]] = all_gather_values(dict(texts))
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


def first_problem(own: Problem | None, device: torch.device) -> Problem | None:
    """The problem of the first rank that has one, on every rank; None: no rank has any.

    Args:
        own: this rank's; device: of its collectives.
    Communication: one all-reduce of 4 bytes over the world, for which the host waits; with a problem a gathering of the
        words.
    """
    has_problem = torch.tensor(own is not None, dtype=torch.int32, device=device)
    dist.all_reduce(has_problem, op=dist.ReduceOp.MAX)
    if not has_problem.item():
        return None
    return next(found for found in all_gather_values(own) if found is not None)


def from_first_rank(compute: Callable[[], T], *kinds: type) -> T:
    """Call a function on rank 0 and return its result on every rank.

    Args:
        kinds: classes of which the result may be made, beside `Problem` and plain values (`message_text`).
    Raises:
        Exception: on every rank what it raises there, where that is an `EbftError` or an `OSError`; of any other error
            the other ranks learn the words (`FirstRankFailedError`).
    Communication: one broadcast of the result over the world.
    """
    if dist.get_rank() != 0:
        result, failure = from_message(broadcast_message(None), kinds)
        if failure is not None:
            raise failure
        return result
    try:
        result = compute()
        content = to_message((result, None), kinds)
    except Exception as error:
        broadcast_message(to_message((None, error), kinds))
        raise
    broadcast_message(content)
    return result
