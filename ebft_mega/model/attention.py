"""Attention of the strided layout: rollouts see a prefix of the document and their own tokens, nothing else.

A pass carries, along the sequence, `document_length` document positions followed by the rollouts in block-major
order (`R = K * n` rollouts of `tokens_per_rollout` positions each). The document is there once, whatever the number
of samples: all rollouts of a row read the same keys and values.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ebft_mega.rollout.plan import BlockPlan


class Layout(Protocol):
    """What the positions of a pass are; handed to every layer in the place of an attention mask."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of one layer, by number; shapes as in `StridedCoreAttention.forward`."""


@dataclass
class KeyValueCache:
    """Keys and values of the passes so far, per layer number; filled in place by the layers.

    `document` holds [B, groups, P, head_dim] once per row; `generated` [B, groups, R, tokens so far, head_dim].
    """

    document: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    generated: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add one pass's generated keys and values of a layer and return all of them."""
        if layer in self.generated:
            old_keys, old_values = self.generated[layer]
            keys, values = torch.cat((old_keys, keys), dim=3), torch.cat((old_values, values), dim=3)
        self.generated[layer] = keys, values
        return keys, values


@dataclass(frozen=True)
class StridedLayout:
    """What the positions of one pass are; handed to every layer in the place of an attention mask."""

    rollout_anchors: Tensor  # int64 [R], number of document tokens that each rollout may see
    document_length: int  # document positions in this pass; 0 when they are read from the cache
    tokens_per_rollout: int  # generated positions of each rollout in this pass
    cache: KeyValueCache | None = None

    @property
    def num_positions(self) -> int:
        """Positions of the pass."""
        return self.document_length + self.rollout_anchors.numel() * self.tokens_per_rollout

    @classmethod
    def of(
        cls,
        plan: BlockPlan,
        device: torch.device,
        *,
        document_length: int,
        tokens_per_rollout: int,
        cache: KeyValueCache | None = None,
    ) -> "StridedLayout":
        """The layout of a pass over rows of a plan."""
        anchors = torch.tensor(plan.anchors, device=device).repeat_interleave(plan.num_samples)
        return cls(anchors, document_length, tokens_per_rollout, cache)

    @classmethod
    def causal(cls, length: int, device: torch.device) -> "StridedLayout":
        """Plain causal attention over a document, without rollouts."""
        return cls(torch.zeros(0, dtype=torch.int64, device=device), length, 0)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend within the pass; see `StridedCoreAttention`."""
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))  # [B, heads, S, d]
        length, per_rollout = self.document_length, self.tokens_per_rollout
        end, filler = self.num_positions, query.shape[2] - self.num_positions
        parts = []
        if length:
            document_key, document_value = key[:, :, :length], value[:, :, :length]
            parts.append(document_attention(query[:, :, :length], document_key, document_value))
            if self.cache is not None:
                self.cache.document[layer] = document_key, document_value
        elif self.cache is not None:
            document_key, document_value = self.cache.document[layer]
        if per_rollout:
            shape = (self.rollout_anchors.numel(), per_rollout)
            own_key, own_value = (tensor[:, :, length:end].unflatten(2, shape) for tensor in (key, value))
            if self.cache is not None:
                own_key, own_value = self.cache.append(layer, own_key, own_value)
            own_query = query[:, :, length:end].unflatten(2, shape)
            parts.append(
                rollout_attention(
                    own_query, document_key, document_value, own_key, own_value, self.rollout_anchors
                ).flatten(2, 3)
            )
        if filler:
            parts.append(query.new_zeros(*query.shape[:2], filler, query.shape[3]))
        out = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
        return out.permute(2, 0, 1, 3).flatten(2)


def document_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of the document over itself.

    Args:
        query: [B, heads, P, d]; key, value: [B, groups, P, d].
    Returns:
        [B, heads, P, d].
    Communication: none.
    """
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def rollout_attention(
    query: Tensor,
    document_key: Tensor,
    document_value: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    rollout_anchors: Tensor,
) -> Tensor:
    """Attention of generated tokens over their document prefix and their own rollout, in one softmax.

    The last of a rollout's keys belongs to the last of its queries, so decoding one token (`Tq = 1`) and scoring a
    whole rollout (`Tq = Tk`) are the same call.

    Args:
        query: [B, heads, R, Tq, d].
        document_key, document_value: [B, groups, P, d].
        own_key, own_value: [B, groups, R, Tk, d], Tk >= Tq.
        rollout_anchors: int64 [R], how many document tokens each rollout sees.
    Returns:
        [B, heads, R, Tq, d].
    Communication: none.
    """
    rows, heads, rollouts, num_queries, dim = query.shape
    groups, prefix = document_key.shape[1], document_key.shape[2]
    num_keys = own_key.shape[3]
    grouped = query.view(rows, groups, heads // groups, rollouts, num_queries, dim) / math.sqrt(dim)

    flat = grouped.flatten(3, 4)  # [B, groups, heads/groups, R * Tq, d]
    to_document = (flat @ document_key[:, :, None].transpose(-1, -2)).unflatten(3, (rollouts, num_queries))
    to_own = grouped @ own_key[:, :, None].transpose(-1, -2)  # [B, groups, heads/groups, R, Tq, Tk]

    beyond_anchor = torch.arange(prefix, device=query.device) >= rollout_anchors[:, None]  # [R, P]
    query_index = torch.arange(num_queries, device=query.device) + num_keys - num_queries
    in_future = torch.arange(num_keys, device=query.device) > query_index[:, None]  # [Tq, Tk]
    scores = torch.cat(
        (
            to_document.masked_fill(beyond_anchor[:, None, :], -torch.inf),
            to_own.masked_fill(in_future, -torch.inf),
        ),
        dim=-1,
    )
    softmax_dtype = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(dim=-1, dtype=softmax_dtype).to(document_value.dtype)
    on_document, on_own = weights.split((prefix, num_keys), dim=-1)
    out = (on_document.flatten(3, 4) @ document_value[:, :, None]).unflatten(3, (rollouts, num_queries))
    out = out + on_own @ own_value[:, :, None]
    return out.view(rows, heads, rollouts, num_queries, dim)


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
