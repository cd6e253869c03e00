"""The rollouts of a micro-batch as a forest: what begins alike is computed once.

A *prefix* is the first t + 1 tokens of one or more rollouts of one anchor: rollouts of an anchor with equal tokens so
far share one, and with the first token that differs they part for good. Keys, values and hidden states at its last
token are functions of the document before the anchor and of the prefix alone, so merging changes no number.

A prefix that is also the document's own continuation is a *stem*: the document's position `anchor + t` is its row.
Every other one is a *node*, a row that the passes compute. So a node sees the document up to where its rollouts left
it, `anchor + branch`, and from there on the nodes on its path.

All prefixes of one token index t are a *level*, ordered by anchor (`b * K + k`), then by the first rollout that begins
so; rollouts are numbered `(b * K + k) * n + j`. A pass carries the nodes of whole levels, one behind the other. How
many a level has is known only once its tokens are drawn: `read_counts` is the one place where the host waits for them.
The legend of shapes is in `ebft_mega/types.py`; of a level there are M prefixes, N of them nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Level:
    """Which rollouts share the prefixes of one token index. Compared by identity, so plans can be cached under it."""

    of_rollout: Tensor  # int64 [B * K, n], the prefix of each rollout
    first: Tensor  # int64 [M], the first rollout of each prefix
    nodes: Tensor  # int64 [N], which prefixes are nodes, increasing
    stems: Tensor  # int64 [M - N], the others
    branch: Tensor  # int64 [N], how many tokens of each node are the document's own before it left the document
    path: Tensor  # int64 [N, t + 1], ancestors and the node itself, numbered through all levels' nodes; -1: a stem
    counts: tuple[int, ...]  # B * K, nodes of each anchor
    prefix_counts: tuple[int, ...]  # B * K, nodes and stems of each anchor
    is_separate: bool  # every rollout has a node of its own: the same level in every step

    def __len__(self) -> int:
        """N."""
        return len(self.nodes)

    @property
    def index(self) -> int:
        """t."""
        return self.path.shape[1] - 1

    @property
    def num_samples(self) -> int:
        """n, rollouts of an anchor."""
        return self.of_rollout.shape[1]

    @cached_property
    def anchors(self) -> Tensor:
        """Of every prefix its anchor, int64 [M]: b * K + k."""
        return self.first // self.num_samples

    @cached_property
    def node_anchors(self) -> Tensor:
        """Of every node its anchor, int64 [N]."""
        return self.anchors if self.is_separate else self.anchors[self.nodes]

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Of every anchor its first node, and N behind the last: B * K + 1 numbers."""
        return tuple(accumulate(self.counts, initial=0))

    @cached_property
    def prefix_starts(self) -> tuple[int, ...]:
        """Of every anchor its first prefix, and M behind the last: B * K + 1 numbers."""
        return tuple(accumulate(self.prefix_counts, initial=0))

    def spread(self, values: Tensor) -> Tensor:
        """What every rollout takes from its prefix: [M, ...] -> [B * K, n, ...]."""
        if values.requires_grad:  # whose gradient is added up in the same order in every run
            return values[self.of_rollout]
        return values.index_select(0, self.of_rollout.flatten()).unflatten(0, self.of_rollout.shape)

    def summed(self, values: Tensor) -> Tensor:
        """The sum over the rollouts of each prefix: [B * K, n, X] -> [M, X], in the same order in every run."""
        if self.is_separate:
            return values.flatten(0, 1)
        together = self.of_rollout[:, :, None] == self.of_rollout[:, None, :]
        return (together.to(values.dtype) @ values).flatten(0, 1).index_select(0, self.first)

    def joined(self, of_nodes: Tensor, of_stems: Tensor) -> Tensor:
        """Values of all prefixes, [M, ...], from those of nodes [N, ...] and of stems [M - N, ...]."""
        return of_nodes if self.is_separate else torch.cat((of_nodes, of_stems))[self._places]

    @cached_property
    def _places(self) -> Tensor:
        """Where each prefix is behind one another in nodes and stems."""
        together = torch.cat((self.nodes, self.stems))
        return torch.empty_like(together).scatter_(0, together, torch.arange(len(together), device=together.device))


@dataclass(frozen=True, eq=False)
class Forest:
    """The prefixes of a micro-batch's rollouts, level by level as their tokens are drawn."""

    num_rows: int  # B
    num_blocks: int  # K
    num_samples: int  # n
    merges: bool  # `ebft.merge_equal_prefixes`; false gives every rollout nodes of its own
    # int64 [B * K, G], the document's own tokens from each anchor on, -1 where no position of the policy's pass stands
    # for them; None: rollouts are not compared with the document
    continuations: Tensor | None = None
    levels: tuple[Level, ...] = ()
    drawn: tuple[Tensor, ...] = ()  # of every rollout the token at each level, int64 [B * K, n]

    @classmethod
    def of(cls, tokens: Tensor, merges: bool, continuations: Tensor | None = None) -> "Forest":
        """The forest of whole rollouts.

        Args:
            tokens: int64 [B, n, K, G].
        Communication: none; the host waits for the device, once per level.
        """
        rows, samples, blocks, _ = tokens.shape
        forest = cls(rows, blocks, samples, merges, continuations)
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
        if self.merges:
            index = len(self.levels)
            own = None if self.continuations is None else self.continuations[:, index, None]
            level = _merged_level(self.levels, by_rollout, own)
        else:
            level = _separate_level(len(by_rollout), self.num_samples, len(self.levels), tokens.device)
        return replace(self, levels=(*self.levels, level), drawn=(*self.drawn, by_rollout))

    def up_to(self, num_levels: int) -> "Forest":
        """The forest of the first tokens of every rollout."""
        return replace(self, levels=self.levels[:num_levels], drawn=self.drawn[:num_levels])

    @property
    def num_anchors(self) -> int:
        """B * K."""
        return self.num_rows * self.num_blocks

    @property
    def num_nodes(self) -> int:
        """Nodes of all levels: the rows that a pass over them computes."""
        return sum(map(len, self.levels))

    @property
    def num_rollout_tokens(self) -> int:
        """Tokens of all rollouts: what `num_nodes` would be if nothing were merged."""
        return self.num_anchors * self.num_samples * len(self.levels)

    def node_tokens(self, index: int) -> Tensor:
        """The tokens of a level's nodes, int64 [N]."""
        level = self.levels[index]
        return self.drawn[index].flatten()[level.first[level.nodes]]

    def rollouts(self) -> Tensor:
        """The tokens of all rollouts, int64 [B, n, K, levels]."""
        return self.by_sample(self.drawn)

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


def read_counts(counts: Tensor) -> list[list[int]]:
    """How many nodes and how many stems each anchor has, on the host, which waits for the device.

    Once per level and micro-batch: sizes of the passes that follow depend on it, so nothing of them can be launched
    before.
    """
    found: list[list[int]] = counts.tolist()
    return found


def _merged_level(before: Sequence[Level], tokens: Tensor, continuation: Tensor | None) -> Level:
    """One more level, where rollouts of an anchor that had one prefix and drew equal tokens have one.

    Args:
        tokens: int64 [B * K, n]; continuation: the document's own, int64 [B * K, 1].
    """
    num_anchors, num_samples = tokens.shape
    previous = before[-1] if before else None
    parents = torch.zeros_like(tokens) if previous is None else previous.of_rollout
    leader = first_equal(torch.stack((parents, tokens), dim=-1))  # [B * K, n], the first sample of the same prefix
    leads = leader == torch.arange(num_samples, device=tokens.device)
    stays = torch.zeros_like(leads) if continuation is None else tokens == continuation
    if previous is not None:
        stays = stays & previous.spread(_is_stem(previous))
    is_node = leads & ~stays
    nodes, stems = read_counts(torch.stack((is_node.sum(dim=1), (leads & stays).sum(dim=1))))
    if not sum(nodes):  # no pass is without any row: what the first rollout holds is computed once more
        is_node[0, 0], nodes[0], stems[0] = True, 1, 0
    number = leads.flatten().cumsum(0).sub_(1)  # of the prefix that each leader begins
    of_rollout = number.view(num_anchors, num_samples).gather(1, leader)
    first = _numbers(leads, sum(nodes) + sum(stems))
    own = _numbers(is_node, sum(nodes))  # the rollouts that nodes are first of
    branch, path = _ancestors(before, parents.flatten()[own])
    return Level(
        of_rollout,
        first,
        number[own],
        number[_numbers(leads & ~is_node, sum(stems))],
        branch,
        path,
        tuple(nodes),
        tuple(map(sum, zip(nodes, stems, strict=True))),
        is_separate=False,
    )


def _numbers(where: Tensor, count: int) -> Tensor:
    """The flat indices at which a mask is true, `count` of them, without asking the device how many there are."""
    flat = where.flatten()
    places = torch.where(flat, flat.cumsum(0) - 1, count)
    indices = torch.arange(len(flat), device=flat.device)
    return indices.new_empty(count + 1).scatter_(0, places, indices)[:-1]


def _is_stem(level: Level) -> Tensor:
    """Of every prefix whether the document holds it: bool [M]."""
    is_stem = torch.zeros(len(level.first), dtype=torch.bool, device=level.first.device)
    return is_stem.index_fill_(0, level.stems, True)


def _ancestors(before: Sequence[Level], parents: Tensor) -> tuple[Tensor, Tensor]:
    """Branches [N] and paths [N, levels before + 1] of new nodes, whose parents are these prefixes [N]."""
    own = torch.arange(len(parents), device=parents.device)[:, None] + sum(map(len, before))
    if not before:
        return torch.zeros_like(parents), own
    last = before[-1]
    of_stems = parents.new_full((len(last.stems), 1 + last.path.shape[1]), -1)
    of_stems[:, 0] = len(before)  # all tokens so far are the document's
    known = last.joined(torch.cat((last.branch[:, None], last.path), dim=1), of_stems)[parents]
    return known[:, 0], torch.cat((known[:, 1:], own), dim=1)


@lru_cache(maxsize=64)
def _separate_levels(num_anchors: int, num_samples: int, count: int, device: torch.device) -> tuple[Level, ...]:
    """Levels in which every rollout has its own node."""
    if not count:
        return ()
    before = _separate_levels(num_anchors, num_samples, count - 1, device)
    first = torch.arange(num_anchors * num_samples, device=device)
    branch, path = _ancestors(before, first)
    counts = (num_samples,) * num_anchors
    new = Level(
        *(first.view(num_anchors, -1), first, first, first[:0], branch, path, counts, counts),
        is_separate=True,
    )
    return (*before, new)


def _separate_level(num_anchors: int, num_samples: int, index: int, device: torch.device) -> Level:
    return _separate_levels(num_anchors, num_samples, index + 1, device)[index]
