"""What every rank must find alike before a run starts, although each looks for itself."""

from collections import defaultdict

import torch.distributed as dist

from ebft_mega.errors import InputError, Problem


def require_agreement(key: str, value: str) -> None:
    """Compare a text over all ranks: machines may hold different copies of what should be one file.

    Args:
        key: what the text describes, for the message.
    Raises:
        InputError: on every rank, with the ranks of each version.
    Communication: one gathering of the text over the world.
    """
    texts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, value)
    ranks: defaultdict[str, list[int]] = defaultdict(list)
    for rank, text in enumerate(texts):
        ranks[str(text)].append(rank)
    if len(ranks) > 1:
        found = "; ".join(f"ranks {', '.join(map(str, members))}: {text}" for text, members in ranks.items())
        raise InputError([Problem("all ranks", key, found, "the same on every rank")])
