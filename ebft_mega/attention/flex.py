"""Attention as one sparse kernel: torch's flex_attention over document and rollouts in block-major order.

The kernel is compiled once per shape. Shapes are those of a run's passes: documents and rollouts are padded to tiles,
and a rollout's keys to `own_capacity`, so that generating token 1 and token G - 1 are one shape. Where masked
documents start is an input of a kernel, not compiled into it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils import _triton

from ebft_mega.attention.pattern import AttentionPattern

TILE = 128  # queries and keys per tile of the block mask: flex_attention's own
MIN_HEAD_DIM = 16  # torch's compiler refuses smaller heads
_PATTERNS = 64  # block masks cached: a run has one per pass of a step, and they repeat every step
# With document masking masks never repeat: cached for as many micro-batches as a pipeline stage may have in flight.
_MASKED_PATTERNS = 16
_SHAPES = 64  # compilations allowed; the default of 8 is less than a run's passes with and without gradients need

# Stand for a rollout's number where a key or a query belongs to no rollout; they equal nothing.
_OTHER_KEY, _OTHER_QUERY = -1, -2
_NEVER = torch.iinfo(torch.int32).max  # document position of a key that is not in the document

_compilations = 0


def num_compilations() -> int:
    """Kernels compiled so far in this process, one per shape."""
    return _compilations


def flex_is_available(device: torch.device) -> bool:
    """Whether flex_attention has a forward and a backward kernel there: on CUDA with Triton."""
    return device.type == "cuda" and bool(_triton.has_triton())


@dataclass(frozen=True)
class FlexAttention:
    """The flex route; on a CPU it has no backward pass."""

    own_capacity: int  # keys per rollout that every pass is padded to; G holds all of a run's passes

    def attend(
        self,
        pattern: AttentionPattern,
        document_query: Tensor,
        own_query: Tensor,
        document_key: Tensor,
        document_value: Tensor,
        own_key: Tensor,
        own_value: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Attend within one pass; see `ebft_mega.attention.routes.AttentionRoute`.

        Raises:
            ValueError: a rollout has more keys than `own_capacity`.
        """
        if pattern.own_keys > self.own_capacity:
            raise ValueError(f"{pattern.own_keys} keys per rollout do not fit into a capacity of {self.own_capacity}")
        mask_of = _shared_mask if pattern.document_starts is None else _mask_per_row
        block_mask = mask_of(pattern, self.own_capacity, document_key.device)
        query = _padded(document_query, own_query, len(pattern.document_queries), pattern.own_queries)
        key = _padded(document_key, own_key, _in_tiles(pattern.document_keys), self.own_capacity)
        value = _padded(document_value, own_value, _in_tiles(pattern.document_keys), self.own_capacity)
        out = _compiled_kernel()(query, key, value, block_mask=block_mask, enable_gqa=True)
        document_out, own_out, _ = out.split(
            (
                len(pattern.document_queries),
                pattern.num_rollouts * pattern.own_queries,
                out.shape[2] - pattern.num_queries,
            ),
            dim=2,
        )
        return document_out, own_out.unflatten(2, own_query.shape[2:4])


@cache
def _compiled_kernel() -> Callable[..., Tensor]:
    """flex_attention, compiled per shape; a shape beyond the limit is an error, not a silent dense fallback."""
    kernel: Callable[..., Tensor] = torch.compile(  # type: ignore[call-overload]  # its stubs lack recompile_limit
        flex_attention, dynamic=False, fullgraph=True, backend=_counting_inductor, recompile_limit=_SHAPES
    )
    return kernel


def _counting_inductor(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
    from torch._inductor.compile_fx import compile_fx  # takes a second to import, and only this route needs it

    global _compilations
    _compilations += 1
    return compile_fx(graph, inputs)


def _in_tiles(length: int, at_least: int = 0) -> int:
    return max(-(-length // TILE), at_least) * TILE


def _padded(document: Tensor, own: Tensor, document_room: int, own_room: int) -> Tensor:
    """Document and rollouts one after another, zeros as filler.

    Args:
        document: [B, heads, up to document_room, d]; own: [B, heads, R, up to own_room, d].
    Returns:
        [B, heads, document_room + R * own_room in whole tiles, d], one tile at least.
    """
    rollouts = own.shape[2]
    end = document_room + rollouts * own_room
    padded = document.new_zeros(*document.shape[:2], _in_tiles(end, 1), document.shape[3])
    padded[:, :, : document.shape[2]] = document
    padded[:, :, document_room:end].unflatten(2, (rollouts, own_room))[:, :, :, : own.shape[3]] = own
    return padded


def _block_mask(pattern: AttentionPattern, own_capacity: int, device: torch.device) -> BlockMask:
    """The pattern over the padded positions of `_padded`: which tiles are needed, and which pairs within them.

    With document masking each row has its own mask; shapes do not depend on where their documents start.
    """
    query_limit, query_rollout, query_token = _query_sides(pattern, device)
    key_position, key_rollout, key_token = _key_sides(pattern, own_capacity, device)
    query_start = _query_starts(pattern, device)  # [rows, queries]

    def sees(_row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_prefix = key_position[key] < query_limit[query]
        own_past = (key_rollout[key] == query_rollout[query]) & (key_token[key] <= query_token[query])
        return in_prefix | own_past

    def sees_in_document(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_document = (key_position[key] < query_limit[query]) & (key_position[key] >= query_start[row, query])
        own_past = (key_rollout[key] == query_rollout[query]) & (key_token[key] <= query_token[query])
        return in_document | own_past

    mask_mod = sees if pattern.document_starts is None else sees_in_document
    keys = torch.arange(key_position.numel(), device=device)
    rows = torch.arange(len(query_start), device=device)[:, None, None]
    any_pair, all_pairs = [], []
    for queries in torch.arange(query_limit.numel(), device=device).split(TILE):
        pairs = mask_mod(rows, rows, queries[:, None], keys[None, :]).expand(len(query_start), -1, -1)
        tiles = pairs.unflatten(2, (-1, TILE))
        any_pair.append(tiles.any(3).any(1))
        all_pairs.append(tiles.all(3).all(1))
    needed, full = torch.stack(any_pair, dim=1), torch.stack(all_pairs, dim=1)  # [rows, query tiles, key tiles]
    return BlockMask.from_kv_blocks(
        *_tile_lists(needed & ~full),
        *_tile_lists(full),
        BLOCK_SIZE=TILE,
        mask_mod=mask_mod,
        seq_lengths=(query_limit.numel(), key_position.numel()),
    )


_shared_mask = lru_cache(maxsize=_PATTERNS)(_block_mask)
_mask_per_row = lru_cache(maxsize=_MASKED_PATTERNS)(_block_mask)


def _tile_lists(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Of [rows, query tiles, key tiles]: how many key tiles are wanted, int32 [rows, 1, query tiles], and which.

    The wanted ones come first, in order: int32 [rows, 1, query tiles, key tiles].
    """
    counts = wanted.sum(2, dtype=torch.int32)
    order = wanted.int().argsort(dim=2, descending=True, stable=True).int()
    return counts[:, None], order[:, None].contiguous()


def _query_starts(pattern: AttentionPattern, device: torch.device) -> Tensor:
    """For each padded query the first document key it sees: int32 [B, queries], or [1, queries] without masking."""
    filler = _in_tiles(pattern.num_queries, 1) - pattern.num_queries
    return _ints(F.pad(pattern.first_keys(torch.device("cpu")), (0, filler)), device)


def _query_sides(pattern: AttentionPattern, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of every padded query: document keys it sees, its rollout, its token; int32."""
    num_document, per_rollout = len(pattern.document_queries), pattern.own_queries
    filler = _in_tiles(pattern.num_queries, 1) - pattern.num_queries
    rollouts = torch.arange(pattern.num_rollouts).repeat_interleave(per_rollout)
    own_limits = torch.tensor(pattern.rollout_limits, dtype=torch.int64).repeat_interleave(per_rollout)
    tokens = torch.arange(pattern.own_keys - per_rollout, pattern.own_keys).repeat(pattern.num_rollouts)
    limit = torch.cat((torch.tensor(pattern.document_limits, dtype=torch.int64), own_limits, _filled(filler, 0)))
    rollout = torch.cat((_filled(num_document, _OTHER_QUERY), rollouts, _filled(filler, _OTHER_QUERY)))
    token = torch.cat((_filled(num_document, 0), tokens, _filled(filler, 0)))
    return _ints(limit, device), _ints(rollout, device), _ints(token, device)


def _key_sides(pattern: AttentionPattern, own_capacity: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of every padded key: its document position, its rollout, its token; int32.

    The room in a rollout beyond its keys needs no mark: its tokens are later than every query's.
    """
    num_document, num_rollouts = pattern.document_keys, pattern.num_rollouts
    gap = _in_tiles(num_document) - num_document
    num_own = num_rollouts * own_capacity
    tail = _in_tiles(num_document + gap + num_own, 1) - num_document - gap - num_own
    own_rollout = torch.arange(num_rollouts).repeat_interleave(own_capacity)
    position = torch.cat((torch.arange(num_document), _filled(gap + num_own + tail, _NEVER)))
    rollout = torch.cat((_filled(num_document + gap, _OTHER_KEY), own_rollout, _filled(tail, _OTHER_KEY)))
    token = torch.cat(
        (_filled(num_document + gap, 0), torch.arange(own_capacity).repeat(num_rollouts), _filled(tail, 0))
    )
    return _ints(position, device), _ints(rollout, device), _ints(token, device)


def _filled(length: int, value: int) -> Tensor:
    return torch.full((length,), value, dtype=torch.int64)


def _ints(values: Tensor, device: torch.device) -> Tensor:
    return values.to(device=device, dtype=torch.int32)
