"""Core attention of a layer: rollouts see a prefix of the document and their own tokens; with key-value cache.

A pass carries, along the sequence, document positions followed by generated ones in token-major order (token 0 of
every rollout, then token 1, ...). The document is there once, whatever the number of samples: all rollouts of a row
read the same keys and values. With document masking, "the document" is all that a row holds, and its documents do
not see each other.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ebft_mega.attention.pattern import AttentionPattern
from ebft_mega.attention.routes import AttentionRoute
from ebft_mega.block_plan import BlockPlan
from ebft_mega.types import RowDocuments


class Layout(Protocol):
    """What the positions of a pass are; passed to every layer as its attention mask."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of one layer, by number; shapes as in `StridedCoreAttention.forward`."""


@dataclass
class KeyValueCache:
    """Keys and values of the passes so far, per layer number; filled in place by the layers.

    `document` holds [B, groups, D, head_dim] once per row; `generated` [B, groups, R, tokens, head_dim].
    """

    capacity: int  # tokens of each rollout that will be added
    document: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    generated: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    length: dict[int, int] = field(default_factory=dict)  # tokens of each rollout so far

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add one pass's keys and values of a layer, [B, groups, R, T, head_dim], and return all of them."""
        first = self.length.get(layer, 0)
        self.length[layer] = first + key.shape[3]
        if torch.is_grad_enabled():
            # Earlier passes' graphs read what they were given, so nothing may be overwritten.
            if first:
                old_key, old_value = self.generated[layer]
                key, value = torch.cat((old_key, key), dim=3), torch.cat((old_value, value), dim=3)
            self.generated[layer] = key, value
            return key, value
        if not first:
            room = (*key.shape[:3], self.capacity, key.shape[4])
            self.generated[layer] = key.new_empty(room), value.new_empty(room)
        keys, values = self.generated[layer]
        keys[:, :, :, first : self.length[layer]] = key
        values[:, :, :, first : self.length[layer]] = value
        return keys[:, :, :, : self.length[layer]], values[:, :, :, : self.length[layer]]


@dataclass(frozen=True)
class ReadRows:
    """The only rows of a pass whose attention is read by anything."""

    document: tuple[int, ...] | range  # document positions, increasing
    tokens_per_rollout: int  # the last ones of each rollout
    positions: Tensor  # int64 [N], where those rows are in the pass: of the document, then of rollouts, token-major
    filler: int = 0  # rows to add, so that sequence-parallel ranks have equally many


@dataclass(frozen=True)
class StridedLayout:
    """The positions of one pass: a document and its rollouts, or a part of them when the rest is cached."""

    anchors: tuple[int, ...]  # K, number of document tokens that each block's rollouts may see
    num_samples: int  # n
    document_length: int  # D, document positions in this pass; 0 when they are read from the cache
    tokens_per_rollout: int  # T, generated positions of each rollout in this pass
    route: AttentionRoute
    cache: KeyValueCache | None = None
    read: ReadRows | None = None  # None: all rows
    # Where each position of the pass lies in the sequence that layers see, int64 [S]; None: in order, then filler.
    order: Tensor | None = None
    document_starts: tuple[tuple[int, ...], ...] | None = None  # with document masking, as in `AttentionPattern`

    @property
    def num_rollouts(self) -> int:
        """R, rollouts of a row."""
        return len(self.anchors) * self.num_samples

    @property
    def num_positions(self) -> int:
        """S, positions of the pass."""
        return self.document_length + self.num_rollouts * self.tokens_per_rollout

    @classmethod
    def of(
        cls,
        plan: BlockPlan,
        route: AttentionRoute,
        *,
        document_length: int,
        tokens_per_rollout: int,
        cache: KeyValueCache | None = None,
        order: Tensor | None = None,
        documents: RowDocuments | None = None,
    ) -> "StridedLayout":
        """The layout of a pass over rows of a plan; with `documents` those of a row do not see each other."""
        starts = None if documents is None else documents.starts
        return cls(
            plan.anchors, plan.num_samples, document_length, tokens_per_rollout, route, cache, None, order, starts
        )

    def reading(self, read: ReadRows) -> "StridedLayout":
        """The same pass, with only some rows as queries."""
        return replace(self, read=read)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend within the pass; see `StridedCoreAttention`. With `read` only its rows are returned, in order."""
        sequence, num_rows = query.shape[:2]
        assert self.document_starts is None or len(self.document_starts) == num_rows, "documents of other rows"
        if self.order is not None:
            query, key, value = (tensor[self.order] for tensor in (query, key, value))
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))  # [B, heads, S, d]
        document_query, own_query = self._parts(query)
        document_key, own_key = self._parts(key)
        document_value, own_value = self._parts(value)
        if self.cache is not None and self.document_length:
            # Not a view: it would keep the whole projection, queries too.
            self.cache.document[layer] = document_key.contiguous(), document_value.contiguous()
        elif self.cache is not None:
            document_key, document_value = self.cache.document[layer]
        if self.cache is not None and self.tokens_per_rollout:
            own_key, own_value = self.cache.append(layer, own_key, own_value)
        pattern = AttentionPattern(
            anchors=self.anchors,
            num_samples=self.num_samples,
            document_queries=range(self.document_length) if self.read is None else self.read.document,
            document_keys=document_key.shape[2],
            own_queries=self.tokens_per_rollout if self.read is None else self.read.tokens_per_rollout,
            own_keys=own_key.shape[3],
            document_starts=self.document_starts,
        )
        if self.read is not None:
            asking = self.read.positions[: len(self.read.document)]
            document_query = document_query.index_select(2, asking)
            own_query = own_query[:, :, :, self.tokens_per_rollout - self.read.tokens_per_rollout :]
        on_document, on_rollouts = self.route.attend(
            pattern, document_query, own_query, document_key, document_value, own_key, own_value
        )
        out = torch.cat((on_document, on_rollouts.transpose(2, 3).flatten(2, 3)), dim=2)  # [B, heads, rows, d]
        return self._in_sequence(out.permute(2, 0, 1, 3).flatten(2), sequence)

    def _parts(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """[B, heads, S or more, d] -> document [B, heads, D, d] and rollouts [B, heads, R, T, d]."""
        own = values[:, :, self.document_length : self.num_positions]
        return values[:, :, : self.document_length], own.unflatten(
            2, (self.tokens_per_rollout, self.num_rollouts)
        ).transpose(2, 3)

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
            query: [S, B, heads, d]; key, value: [S, B, groups, d]; S as `layout` says, or a few positions more:
                filler that makes the sequence divisible among sequence-parallel ranks.
        Returns:
            [S, B, heads * d], zeros for filler.
        Communication: none; heads of other tensor-parallel ranks are theirs.
        """
        return layout.attend(self.layer_number, query, key, value)
