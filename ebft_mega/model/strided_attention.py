"""Core attention of a layer: nodes of rollouts see a prefix of the document and their own path; with key-value cache.

A pass carries, along the sequence, the document positions of all rows of the micro-batch (row by row) followed by the
nodes of the rollouts' forest, level by level (`ebft_mega/forest.py`). Rows have different numbers of nodes, so they
share one sequence: hidden states are [S, 1, H]. The document is there once, whatever the number of samples: all
nodes of a row read the same keys and values. With document masking, "the document" is all that a row holds, and its
documents do not see each other.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ebft_mega.attention.pattern import AttentionPattern
from ebft_mega.attention.routes import AttentionRoute
from ebft_mega.block_plan import BlockPlan
from ebft_mega.forest import Forest, Level
from ebft_mega.types import RowDocuments


class Layout(Protocol):
    """What the positions of a pass are; passed to every layer as its attention mask."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of one layer, by number; shapes as in `StridedCoreAttention.forward`."""


@dataclass
class KeyValueCache:
    """Keys and values of the passes so far, per layer number; filled in place by the layers.

    `document` holds [B, groups, D, head_dim] once per row; `nodes` [groups, nodes, head_dim] of the levels so far.
    """

    document: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    nodes: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add one pass's keys and values of a layer, [groups, N, head_dim], and return those of all nodes."""
        if layer in self.nodes:
            old_key, old_value = self.nodes[layer]
            key, value = torch.cat((old_key, key), dim=1), torch.cat((old_value, value), dim=1)
        else:  # not a view: it would keep the whole projection, queries too
            key, value = key.contiguous(), value.contiguous()
        self.nodes[layer] = key, value
        return key, value


@dataclass(frozen=True)
class ReadRows:
    """The only rows of a pass whose attention is read by anything."""

    document: tuple[int, ...] | range  # document positions, increasing, the same of every row
    levels: int  # the last ones of the forest's
    # int64 [rows read], where those rows are in the pass: of each row's document, then of nodes, level by level
    positions: Tensor
    filler: int = 0  # rows to add, so that sequence-parallel ranks have equally many


@dataclass(frozen=True)
class StridedLayout:
    """The positions of one pass: documents and their rollouts, or a part of them when the rest is cached."""

    num_rows: int  # B
    anchors: tuple[int, ...]  # K, number of document tokens that each block's rollouts may see
    document_length: int  # D, document positions of each row in this pass; 0 when they are read from the cache
    levels: tuple[Level, ...]  # of all nodes so far
    new_levels: int  # how many of them are in this pass, the last ones; the others are cached
    route: AttentionRoute
    cache: KeyValueCache | None = None
    read: ReadRows | None = None  # None: all rows
    # Where each position of the pass lies in the sequence that layers see, int64 [S]; None: in order, then filler.
    order: Tensor | None = None
    document_starts: tuple[tuple[int, ...], ...] | None = None  # with document masking, as in `AttentionPattern`

    @property
    def num_document(self) -> int:
        """Document positions of the pass, of all rows."""
        return self.num_rows * self.document_length

    @property
    def num_positions(self) -> int:
        """S, positions of the pass."""
        return self.num_document + sum(map(len, self.levels[len(self.levels) - self.new_levels :]))

    @classmethod
    def of(
        cls,
        plan: BlockPlan,
        route: AttentionRoute,
        *,
        num_rows: int,
        document_length: int,
        forest: Forest | None = None,
        new_levels: int | None = None,
        cache: KeyValueCache | None = None,
        order: Tensor | None = None,
        documents: RowDocuments | None = None,
    ) -> "StridedLayout":
        """The layout of a pass over rows of a plan; with `documents` those of a row do not see each other.

        Args:
            forest: the nodes so far; None: no rollouts. new_levels: None: all of them are in this pass.
        """
        levels = () if forest is None else forest.levels
        new = len(levels) if new_levels is None else new_levels
        starts = None if documents is None else documents.starts
        return cls(num_rows, plan.anchors, document_length, levels, new, route, cache, None, order, starts)

    def reading(self, read: ReadRows) -> "StridedLayout":
        """The same pass, with only some rows as queries."""
        return replace(self, read=read)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend within the pass; see `StridedCoreAttention`. With `read` only its rows are returned, in order."""
        sequence, rows = query.shape[:2]
        assert rows == 1, "rows share one sequence"
        assert self.document_starts is None or len(self.document_starts) == self.num_rows, "documents of other rows"
        query, key, value = query[:, 0], key[:, 0], value[:, 0]
        if self.order is not None:
            query, key, value = (tensor[self.order] for tensor in (query, key, value))
        document_query, own_query = self._parts(query)
        document_key, own_key = self._parts(key)
        document_value, own_value = self._parts(value)
        if self.cache is not None and self.document_length:
            # Not a view: it would keep the whole projection, queries too.
            self.cache.document[layer] = document_key.contiguous(), document_value.contiguous()
        elif self.cache is not None:
            document_key, document_value = self.cache.document[layer]
        if self.cache is not None and self.new_levels:
            own_key, own_value = self.cache.append(layer, own_key, own_value)
        pattern = AttentionPattern(
            num_rows=self.num_rows,
            anchors=self.anchors,
            document_queries=range(self.document_length) if self.read is None else self.read.document,
            document_keys=document_key.shape[2],
            levels=self.levels,
            asking=self.new_levels if self.read is None else self.read.levels,
            document_starts=self.document_starts,
        )
        if self.read is not None:
            asking = self.read.positions[: len(self.read.document)]  # of the first row; all have the same
            document_query = document_query.index_select(2, asking)
            own_query = own_query[:, own_query.shape[1] - pattern.own_queries :]
        on_document, on_nodes = self.route.attend(
            pattern, document_query, own_query, document_key, document_value, own_key, own_value
        )
        out = torch.cat((on_document.transpose(1, 2).flatten(0, 1), on_nodes.transpose(0, 1)))  # [S, heads, d]
        return self._in_sequence(out.flatten(1)[:, None], sequence)

    def _parts(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """[S or more, heads, d] -> documents [B, heads, D, d] and nodes [heads, N, d]."""
        documents = values[: self.num_document].unflatten(0, (self.num_rows, self.document_length))
        return documents.transpose(1, 2), values[self.num_document : self.num_positions].transpose(0, 1)

    def _in_sequence(self, rows: Tensor, length: int) -> Tensor:
        """Rows back where the layer expects them, with zeros for filler; rows that were picked stay in order."""
        if self.order is not None:
            return rows.new_zeros((length, *rows.shape[1:])).index_copy(0, self.order, rows)
        filler = length - len(rows) if self.read is None else self.read.filler
        return torch.cat((rows, rows.new_zeros((filler, *rows.shape[1:])))) if filler else rows


class StridedCoreAttention(torch.nn.Module):
    """The core attention of a megatron-core layer: queries and keys come in after the rotary embedding."""

    def __init__(self, layer_number: int, **_: Any):
        """Only the layer's number matters; sizes are read from the tensors, so shards need no setting."""
        super().__init__()
        self.layer_number = layer_number

    def forward(self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, **_: Any) -> Tensor:
        """Attend as a layout says.

        Args:
            query: [S, 1, heads, d]; key, value: [S, 1, groups, d]; S as `layout` says, or a few positions more:
                filler that makes the sequence divisible among sequence-parallel ranks.
        Returns:
            [S, 1, heads * d], zeros for filler.
        Communication: none; heads of other tensor-parallel ranks are theirs.
        """
        return layout.attend(self.layer_number, query, key, value)
