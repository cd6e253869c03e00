"""Which query may see which key in one pass: the definition that every attention implementation must equal."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from ebft_mega.forest import Level


@dataclass(frozen=True)
class AttentionPattern:
    """Which queries see which keys, in one pass over rows that carry a document and the nodes of its rollouts.

    A document query at position p sees the document keys 0..p of its row. A node of block k of a row sees the row's
    document keys 0..anchors[k]+branch-1, the nodes on its path and itself; it sees no other node. Nodes are level by
    level (`ebft_mega/forest.py`), and the last levels ask.
    With `document_starts` a row holds several documents, of which none sees another: a query at position p sees no key
    before the start of its document, a node of block k none before that of the document of position anchors[k] - 1.
    Hashable, so that what is derived from a pattern can be cached under it.
    """

    num_rows: int  # B
    anchors: tuple[int, ...]  # K, document tokens that each block's rollouts see; increasing, from 1
    document_queries: tuple[int, ...] | range  # Nd positions of the document rows that ask, increasing; of every row
    document_keys: int  # D, document keys there are of a row: positions 0..D-1
    levels: tuple[Level, ...] = ()  # of the nodes whose keys there are
    asking: int = 0  # how many of them ask, the last ones
    # B rows, of each the first position of every document, increasing from 0; None: every row is one document. Starts
    # beyond the document keys mean nothing.
    document_starts: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        asking = self.document_queries
        if not _increasing(self.anchors) or (self.anchors and self.anchors[0] < 1):
            raise ValueError(f"anchors must increase from at least 1, not {self.anchors}")
        if not _increasing(asking) or (asking and asking[0] < 0):
            raise ValueError(f"document queries must increase from at least 0, not {asking}")
        needed = max((*(p + 1 for p in asking[-1:]), *self.anchors[-1:] * (self.asking > 0)), default=0)
        if self.document_keys < needed:
            raise ValueError(f"{self.document_keys} document keys, but the queries see {needed}")
        if not 0 <= self.asking <= len(self.levels):
            raise ValueError(f"{self.asking} levels of nodes that ask, of {len(self.levels)}")
        if any(len(level.counts) != self.num_rows * len(self.anchors) for level in self.levels):
            raise ValueError(f"nodes of other anchors than {self.num_rows} rows of {len(self.anchors)}")
        for starts in self.document_starts or ():
            if starts[:1] != (0,) or not _increasing(starts):
                raise ValueError(f"document starts must increase from 0, not {starts}")

    @property
    def asking_levels(self) -> tuple[Level, ...]:
        """The last levels, whose nodes ask."""
        return self.levels[len(self.levels) - self.asking :]

    @property
    def is_shared(self) -> bool:
        """Whether other micro-batches have the same pattern: nothing in it depends on tokens."""
        return self.document_starts is None and all(level.is_separate for level in self.levels)

    @property
    def document_limits(self) -> tuple[int, ...]:
        """Nd, how many document keys each document query sees."""
        return tuple(position + 1 for position in self.document_queries)

    @property
    def own_queries(self) -> int:
        """Nodes that ask, over all rows."""
        return sum(map(len, self.asking_levels))

    @property
    def own_keys(self) -> int:
        """Nodes that there are, over all rows."""
        return sum(map(len, self.levels))

    @cached_property
    def nodes_per_anchor(self) -> tuple[int, ...]:
        """B * K, how many nodes of every anchor ask."""
        counts = [level.counts for level in self.asking_levels]
        return tuple(map(sum, zip(*counts, strict=True))) or (0,) * (self.num_rows * len(self.anchors))

    @property
    def longest_branch(self) -> int:
        """Most tokens beyond its anchor that a node may see of the document."""
        return max((level.index for level in self.levels if len(level.stems)), default=-1) + 1

    @cached_property
    def rows_are_alike(self) -> bool:
        """Whether all rows have equally many asking nodes of each block, which see equally much of the document."""
        blocks, counts = len(self.anchors), self.nodes_per_anchor
        return not self.longest_branch and all(
            counts[:blocks] == counts[first : first + blocks] for first in range(0, len(counts), blocks or 1)
        )

    def starts_of(self, row: int) -> tuple[int, ...]:
        """The first position of every document of a row."""
        return (0,) if self.document_starts is None else self.document_starts[row]

    def seen_from(self, row: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The first document key that each document query (Nd) and the nodes of each block (K) see."""
        starts = self.starts_of(row)

        def first_keys(positions: Sequence[int]) -> tuple[int, ...]:
            return tuple(starts[bisect_right(starts, p) - 1] for p in positions)

        return first_keys(self.document_queries), first_keys([anchor - 1 for anchor in self.anchors])

    @property
    def num_pairs(self) -> int:
        """Query-key pairs that are needed, per head, over all rows.

        Where a node left the document makes no difference: what it sees is anchor + t + 1 keys.
        """
        first_level = len(self.levels) - self.asking
        pairs = sum((first_level + t + 1) * len(level) for t, level in enumerate(self.asking_levels))
        for row in range(self.num_rows):
            of_document, of_blocks = self.seen_from(row)
            nodes = self.nodes_per_anchor[row * len(self.anchors) :]
            pairs += sum(self.document_limits) - sum(of_document)
            pairs += sum(
                count * (anchor - first) for count, anchor, first in zip(nodes, self.anchors, of_blocks, strict=False)
            )
        return pairs

    @property
    def dense_pairs(self) -> int:
        """Query-key pairs of the whole rectangles of all rows, per head."""
        return sum(queries * keys for queries, keys in map(self._sizes_of, range(self.num_rows)))

    def _sizes_of(self, row: int) -> tuple[int, int]:
        """Queries and keys of a row."""
        blocks = slice(row * len(self.anchors), (row + 1) * len(self.anchors))
        queries = sum(self.nodes_per_anchor[blocks])
        keys = sum(sum(level.counts[blocks]) for level in self.levels)
        return len(self.document_queries) + queries, self.document_keys + keys

    def nodes_of(self, row: int, asking: bool = False) -> Tensor:
        """The nodes of a row, int64, numbered through all levels or, `asking`, through those that ask; increasing."""
        blocks = len(self.anchors)
        found, before = [], 0
        for level in self.asking_levels if asking else self.levels:
            first, end = level.starts[row * blocks], level.starts[(row + 1) * blocks]
            found.append(torch.arange(before + first, before + end, device=level.first.device))
            before += len(level)
        return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)

    def mask(self, row: int, device: torch.device) -> Tensor:
        """Who sees whom in a row, written out.

        Returns:
            bool [Nd + asking nodes of the row, D + nodes of the row], true where a query sees a key; nodes as
            `nodes_of` lists them.
        """
        of_document, of_blocks = (torch.tensor(f, dtype=torch.int64, device=device) for f in self.seen_from(row))
        limits = torch.tensor(self.document_limits, dtype=torch.int64, device=device)
        keys, nodes = torch.arange(self.document_keys, device=device), self.nodes_of(row).to(device)
        on_document = (keys < limits[:, None]) & (keys >= of_document[:, None])
        rows = [torch.cat((on_document, keys.new_zeros((len(limits), len(nodes)), dtype=torch.bool)), dim=1)]
        anchors = torch.tensor(self.anchors, dtype=torch.int64, device=device)
        blocks = len(self.anchors)
        for level in self.asking_levels:
            own = slice(level.starts[row * blocks], level.starts[(row + 1) * blocks])
            block = level.node_anchors[own].to(device) - row * blocks
            limits = anchors[block] + level.branch[own].to(device)
            in_prefix = (keys < limits[:, None]) & (keys >= of_blocks[block][:, None])
            on_path = (level.path[own].to(device)[:, :, None] == nodes).any(dim=1)
            rows.append(torch.cat((in_prefix, on_path), dim=1))
        return torch.cat(rows)


def _increasing(numbers: tuple[int, ...] | range) -> bool:
    if isinstance(numbers, range):
        return numbers.step > 0 or len(numbers) < 2
    return all(first < second for first, second in pairwise(numbers))
