"""The rollouts of a micro-batch as a forest: what begins alike is computed once.

A *node* is the first t + 1 tokens of one or more rollouts of one anchor. Rollouts of an anchor with equal tokens so far
pass through one node; with the first token that differs they part for good. A node's keys, values and hidden states
are functions of the document before the anchor and of the node's own tokens alone, so merging changes no number: it is
where rows that are equal are computed once.

All nodes of one token index t are a *level*. Within a level nodes are ordered by anchor (`b * K + k`), then by the
first rollout that passes through them; rollouts are numbered `(b * K + k) * n + j`. A pass carries whole levels, one
behind the other. How many nodes a level has is known only once its tokens are drawn: `read_counts` is the one place
where the host waits for them. The legend of shapes is in `ebft_mega/types.py`; N are the nodes of a level.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Level:
    """Which rollouts share the nodes of one token index. Compared by identity, so plans can be cached under it."""

    of_rollout: Tensor  # int64 [B * K, n], the node that each rollout passes through
    first: Tensor  # int64 [N], the first rollout that passes through each node
    path: Tensor  # int64 [N, t + 1], the node's ancestors and itself, numbered through all levels
    counts: tuple[int, ...]  # B * K, nodes of each anchor
    is_separate: bool  # every rollout has a node of its own: the same level in every step

    def __len__(self) -> int:
        """N."""
        return len(self.first)

    @property
    def num_samples(self) -> int:
        """n, rollouts of an anchor."""
        return self.of_rollout.shape[1]

    @cached_property
    def anchors(self) -> Tensor:
        """Of every node its anchor, int64 [N]: b * K + k."""
        return self.first // self.num_samples

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Of every anchor its first node, and N behind the last: B * K + 1 numbers."""
        return tuple(accumulate(self.counts, initial=0))

    def spread(self, values: Tensor) -> Tensor:
        """What every rollout takes from its node: [N, ...] -> [B * K, n, ...]."""
        return values[self.of_rollout]


@dataclass(frozen=True, eq=False)
class Forest:
    """The nodes of a micro-batch's rollouts, level by level as their tokens are drawn."""

    num_rows: int  # B
    num_blocks: int  # K
    num_samples: int  # n
    merges: bool  # `ebft.merge_equal_prefixes`; false gives every rollout nodes of its own
    levels: tuple[Level, ...] = ()
    tokens: tuple[Tensor, ...] = field(default=())  # of each level, int64 [N]

    @classmethod
    def of(cls, tokens: Tensor, merges: bool) -> "Forest":
        """The forest of whole rollouts.

        Args:
            tokens: int64 [B, n, K, G].
        Communication: none; the host waits for the device, once per level.
        """
        rows, samples, blocks, _ = tokens.shape
        forest = cls(rows, blocks, samples, merges)
        for drawn in tokens.unbind(-1):
            forest = forest.extended(drawn)
        return forest

    def extended(self, tokens: Tensor) -> "Forest":
        """The forest with one more token of every rollout.

        Args:
            tokens: int64 [B, n, K].
        Communication: none; what `read_counts` says if anything can be merged.
        """
        by_rollout = tokens.transpose(1, 2).reshape(-1, self.num_samples)  # [B * K, n]
        if self.merges and self.num_samples > 1:
            level = _merged_level(self.levels, by_rollout)
        else:
            level = _separate_level(len(by_rollout), self.num_samples, len(self.levels), tokens.device)
        drawn = by_rollout.flatten()[level.first]
        return Forest(
            self.num_rows,
            self.num_blocks,
            self.num_samples,
            self.merges,
            (*self.levels, level),
            (*self.tokens, drawn),
        )

    def up_to(self, num_levels: int) -> "Forest":
        """The forest of the first tokens of every rollout."""
        sizes = self.num_rows, self.num_blocks, self.num_samples, self.merges
        return Forest(*sizes, self.levels[:num_levels], self.tokens[:num_levels])

    @property
    def num_anchors(self) -> int:
        """B * K."""
        return self.num_rows * self.num_blocks

    @property
    def num_nodes(self) -> int:
        """Nodes of all levels."""
        return sum(map(len, self.levels))

    @property
    def num_rollout_tokens(self) -> int:
        """Tokens of all rollouts: what `num_nodes` would be if no two began alike."""
        return self.num_anchors * self.num_samples * len(self.levels)

    def drawn(self, level: int) -> Tensor:
        """The token of every rollout at a level, int64 [B * K, n]."""
        return self.levels[level].spread(self.tokens[level])

    def rollouts(self) -> Tensor:
        """The tokens of all rollouts, int64 [B, n, K, levels]."""
        return self.by_sample([self.drawn(level) for level in range(len(self.levels))])

    def by_sample(self, values: Sequence[Tensor]) -> Tensor:
        """Values of rollouts, level by level [B * K, n], in the order in which rollouts leave the model.

        Returns:
            [B, n, K, levels].
        """
        return torch.stack(list(values), dim=-1).unflatten(0, (self.num_rows, -1)).transpose(1, 2)


def first_equal(rows: Tensor) -> Tensor:
    """For every row, the index of the first row that equals it.

    Args:
        rows: [..., n, X].
    Returns:
        int64 [..., n], at most the row's own index.
    Communication: none.
    """
    num_rows = rows.shape[-2]
    equal = (rows[..., :, None, :] == rows[..., None, :, :]).all(dim=-1)
    # A row with NaN equals not even itself; it must not be taken for the first.
    equal = equal | torch.eye(num_rows, dtype=torch.bool, device=rows.device)
    return equal.to(torch.uint8).argmax(dim=-1)


def read_counts(counts: Tensor) -> tuple[int, ...]:
    """How many nodes each anchor has, on the host, which waits for the device: once per level and micro-batch.

    Sizes of the passes that follow depend on it, so nothing of them can be launched before.
    """
    return tuple(counts.tolist())


def _merged_level(before: Sequence[Level], tokens: Tensor) -> Level:
    """One more level, where rollouts of an anchor that were one node and drew equal tokens are one.

    Args:
        tokens: int64 [B * K, n].
    """
    num_anchors, num_samples = tokens.shape
    parents = before[-1].of_rollout if before else torch.zeros_like(tokens)
    leader = first_equal(torch.stack((parents, tokens), dim=-1))  # [B * K, n], the first sample of the same node
    leads = leader == torch.arange(num_samples, device=tokens.device)
    counts = read_counts(leads.sum(dim=1))
    number = leads.flatten().cumsum(0).sub_(1)  # of the node of each leader
    of_rollout = number.view(num_anchors, num_samples).gather(1, leader)
    # The sizes are known to the host: no operation has to ask the device for them.
    places = torch.where(leads.flatten(), number, sum(counts))
    rollouts = torch.arange(tokens.numel(), device=tokens.device)
    first = rollouts.new_empty(sum(counts) + 1).scatter_(0, places, rollouts)[:-1]
    return Level(of_rollout, first, _paths(before, first), counts, is_separate=False)


@lru_cache(maxsize=64)
def _separate_levels(num_anchors: int, num_samples: int, count: int, device: torch.device) -> tuple[Level, ...]:
    """Levels in which every rollout has its own node."""
    if not count:
        return ()
    before = _separate_levels(num_anchors, num_samples, count - 1, device)
    first = torch.arange(num_anchors * num_samples, device=device)
    counts = (num_samples,) * num_anchors
    return (*before, Level(first.view(num_anchors, -1), first, _paths(before, first), counts, is_separate=True))


def _separate_level(num_anchors: int, num_samples: int, index: int, device: torch.device) -> Level:
    return _separate_levels(num_anchors, num_samples, index + 1, device)[index]


def _paths(before: Sequence[Level], first: Tensor) -> Tensor:
    """Ancestors of the nodes of the next level, and themselves, [N, levels before + 1]."""
    own = torch.arange(len(first), device=first.device)[:, None] + sum(map(len, before))
    if not before:
        return own
    parents = before[-1].of_rollout.flatten()[first]
    return torch.cat((before[-1].path[parents], own), dim=1)
