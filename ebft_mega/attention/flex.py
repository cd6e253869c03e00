"""Attention as one sparse kernel: torch's flex_attention over a row's document and its nodes, each row in its own room.

Nodes are put in the order of a walk through their row's trees (`_walk`): a node's followers come right behind it. So
whose path a node is on is an interval of places, which takes two comparisons, and the nodes on a path lie in few tiles.

The kernel is compiled once per shape, so shapes are few. Documents are padded to tiles. The asking nodes of every row
are padded to those of the row that has most, and these to one of four sizes: quarters of what they would be if nothing
were merged. Keys of nodes are always padded to what all rollouts of a row could have, `own_capacity` each. So a kind of
pass (decode, packed, features, their last layer) has at most `NODE_SIZES` kernels, one where nothing is merged or no
node asks, whatever the rollouts are; generating token 1 and token G - 1 are one shape. What filler costs is in
`docs/performance.md`. Masks are inputs of a kernel, not compiled into it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils import _triton

from ebft_mega.attention.pattern import AttentionPattern
from ebft_mega.forest import Level

TILE = 128  # queries and keys per tile of the block mask: flex_attention's own
MIN_HEAD_DIM = 16  # torch's compiler refuses smaller heads
NODE_SIZES = 4  # sizes of a kind of pass, by its asking nodes: quarters of the most that there can be
_PATTERNS = 64  # layouts cached: a run has one per pass of a step, and they repeat every step
# With document masking or merged rollouts layouts never repeat: cached for the layers of a pass, and for as many
# micro-batches as a pipeline stage may have in flight.
_PASSING_PATTERNS = 16
# Compilations allowed: a document's and four kinds of pass in all sizes, with and without gradients, in training and
# in evaluation. Torch's default is 8.
_SHAPES = 4 * (1 + 4 * NODE_SIZES)
_NO_NODE = -1  # place of a query that is not a node's; no key has it

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

    own_capacity: int  # most levels of any pass: keys that every rollout has room for; G holds all of a run's passes

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
            ValueError: the pass has more levels than `own_capacity`.
        """
        if len(pattern.levels) > self.own_capacity:
            raise ValueError(f"{len(pattern.levels)} levels do not fit into a capacity of {self.own_capacity}")
        rooms_of = _repeated_rooms if pattern.is_shared else _passing_rooms
        rooms = rooms_of(pattern, self.own_capacity, document_key.device)
        query = rooms.queries.padded(document_query, own_query)
        key = rooms.keys.padded(document_key, own_key)
        value = rooms.keys.padded(document_value, own_value)
        out = _compiled_kernel()(query, key, value, block_mask=rooms.block_mask, enable_gqa=True)
        return rooms.queries.parts(out)


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


@dataclass(frozen=True)
class Room:
    """Where queries or keys of a pass lie: of every row its document, then its nodes, then filler to whole tiles."""

    document: int  # document positions of a row
    first: int  # where a row's nodes begin
    size: int  # how many nodes of a row there is room for
    rows: Tensor  # int64 [N], of the nodes level by level
    places: Tensor  # int64 [N], in the row, counted with the document: from `first` on

    @property
    def length(self) -> int:
        """All positions of a row: one tile at least."""
        return _in_tiles(self.first + self.size, 1)

    def padded(self, document: Tensor, nodes: Tensor) -> Tensor:
        """[B, heads, positions, d] and [heads, N, d], level by level -> [B, heads, length, d], zeros as filler."""
        padded = document.new_zeros(*document.shape[:2], self.length, document.shape[3])
        padded[:, :, : self.document] = document
        padded[self.rows, :, self.places] = nodes.transpose(0, 1)
        return padded

    def parts(self, padded: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `padded`."""
        own = padded[:, :, self.first : self.first + self.size].transpose(0, 1).flatten(1, 2)
        where = self.rows * self.size + self.places - self.first
        return padded[:, :, : self.document], own.index_select(1, where)


@dataclass(frozen=True)
class _Rooms:
    """A pass as the kernel takes it."""

    queries: Room
    keys: Room
    block_mask: BlockMask


def _make_rooms(pattern: AttentionPattern, own_capacity: int, device: torch.device) -> _Rooms:
    """Room for a pass's positions, and who sees whom there."""
    queries, keys = room_of(pattern, own_capacity, device)
    return _Rooms(queries, keys, _block_mask(pattern, queries, keys))


_repeated_rooms = lru_cache(maxsize=_PATTERNS)(_make_rooms)
_passing_rooms = lru_cache(maxsize=_PASSING_PATTERNS)(_make_rooms)


def room_of(pattern: AttentionPattern, own_capacity: int, device: torch.device) -> tuple[Room, Room]:
    """Where a pass's queries and keys lie."""
    order = _walk(pattern.levels, device)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device))
    first = pattern.own_keys - pattern.own_queries  # the last nodes are those that ask
    asking_places = ((order >= first).cumsum(0) - 1)[places[first:]]
    rows = _joined([level.node_anchors // len(pattern.anchors) for level in pattern.levels], device)
    keys_of_rows, queries_of_rows = (
        _nodes_of_rows(pattern, levels) for levels in (pattern.levels, pattern.asking_levels)
    )

    document = len(pattern.document_queries)
    queries = Room(
        document,
        document,
        query_room(pattern, max(queries_of_rows, default=0)),
        rows[first:],
        document + asking_places - _before(queries_of_rows, device)[rows[first:]],
    )
    begin = _in_tiles(pattern.document_keys)
    keys = Room(
        pattern.document_keys,
        begin,
        _most_nodes(pattern, own_capacity if pattern.levels else 0),
        rows,
        begin + places - _before(keys_of_rows, device)[rows],
    )
    return queries, keys


def query_room(pattern: AttentionPattern, most: int) -> int:
    """How many asking nodes there is room for in each row: a quarter, half, three quarters or all that there can be.

    Args:
        most: asking nodes of the row that has most.
    """
    if not most:
        return 0
    all_nodes = _most_nodes(pattern, pattern.asking)
    quarter = -(-all_nodes // NODE_SIZES)
    return min(-(-most // quarter) * quarter, all_nodes)


def _most_nodes(pattern: AttentionPattern, num_levels: int) -> int:
    """Nodes that so many levels of a row would have if nothing were merged."""
    if not num_levels:
        return 0
    return len(pattern.anchors) * pattern.levels[0].num_samples * num_levels


def _nodes_of_rows(pattern: AttentionPattern, levels: Sequence[Level]) -> list[int]:
    """B, how many nodes each row has."""
    blocks = len(pattern.anchors)
    return [
        sum(level.starts[(row + 1) * blocks] - level.starts[row * blocks] for level in levels)
        for row in range(pattern.num_rows)
    ]


def _before(counts: Sequence[int], device: torch.device) -> Tensor:
    """Of every row the nodes of the rows before it, int64 [B]."""
    return torch.tensor([0, *accumulate(counts[:-1])], dtype=torch.int64).to(device)


def _walk(levels: Sequence[Level], device: torch.device) -> Tensor:
    """All nodes, int64 [Nk], so that each is followed by those whose path it is on: rows and blocks in their order."""
    order = torch.arange(sum(map(len, levels)), device=device)
    # Paths in the order of a dictionary, in which a beginning stands before what continues it.
    paths = [F.pad(level.path, (0, len(levels) - level.path.shape[1]), value=-1) for level in levels]
    sorted_by = [*_joined(paths, device).unbind(1)] if paths else []
    for column in (*reversed(sorted_by), _joined([level.node_anchors for level in levels], device)):
        order = order[column[order].argsort(stable=True)]
    return order


def _joined(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.cat(list(parts)) if parts else torch.empty(0, dtype=torch.int64, device=device)


def _block_mask(pattern: AttentionPattern, queries: Room, keys: Room) -> BlockMask:
    """The pattern over the positions of `Room.padded`: which tiles are needed, and which pairs within them.

    Every row has its own mask. Tables that pairs are looked up in are int32; filler sees nothing and nobody sees it.
    """
    first_key, end_key, own_key = _query_tables(pattern, queries, keys)
    end_of_followers = _ends_of_followers(pattern, keys)
    device = keys.places.device

    def sees(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_document = (key >= first_key[row, query]) & (key < end_key[row, query])
        on_path = (key <= own_key[row, query]) & (own_key[row, query] < end_of_followers[row, key])
        return in_document | on_path

    all_keys = torch.arange(keys.length, device=device)
    rows = torch.arange(pattern.num_rows, device=device)[:, None, None]
    any_pair, all_pairs = [], []
    for some in torch.arange(queries.length, device=device).split(TILE):
        tiles = sees(rows, rows, some[:, None], all_keys[None, :]).unflatten(2, (-1, TILE))
        any_pair.append(tiles.any(3).any(1))
        all_pairs.append(tiles.all(3).all(1))
    needed, full = torch.stack(any_pair, dim=1), torch.stack(all_pairs, dim=1)  # [rows, query tiles, key tiles]
    return BlockMask.from_kv_blocks(
        *_tile_lists(needed & ~full),
        *_tile_lists(full),
        BLOCK_SIZE=TILE,
        mask_mod=sees,
        seq_lengths=(queries.length, keys.length),
    )


def _tile_lists(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Of [rows, query tiles, key tiles]: how many key tiles are wanted, int32 [rows, 1, query tiles], and which.

    The wanted ones come first, in order: int32 [rows, 1, query tiles, key tiles].
    """
    counts = wanted.sum(2, dtype=torch.int32)
    order = wanted.int().argsort(dim=2, descending=True, stable=True).int()
    return counts[:, None], order[:, None].contiguous()


def _query_tables(pattern: AttentionPattern, queries: Room, keys: Room) -> tuple[Tensor, Tensor, Tensor]:
    """Of every query: the first document key it sees, the end of those, and the place of its own key; int32 [B, Q]."""
    num_rows, blocks, device = pattern.num_rows, len(pattern.anchors), keys.places.device
    seen_from = [pattern.seen_from(row) for row in range(num_rows)]
    first_key, end_key = (torch.zeros(num_rows, queries.length, dtype=torch.int32, device=device) for _ in range(2))
    first_key[:, : queries.document] = _ints([of_document for of_document, _ in seen_from], device)
    end_key[:, : queries.document] = _ints(pattern.document_limits, device)
    own_key = torch.full_like(first_key, _NO_NODE)
    if pattern.asking:
        anchors = torch.cat([level.node_anchors for level in pattern.asking_levels])  # row * blocks + block
        branches = torch.cat([level.branch for level in pattern.asking_levels])
        where = queries.rows, queries.places
        first_key[where] = _ints([of_blocks for _, of_blocks in seen_from], device).flatten()[anchors]
        end_key[where] = _ints(pattern.anchors, device)[anchors % blocks] + branches.int()
        own_key[where] = keys.places[len(keys.places) - len(queries.places) :].int()
    return first_key, end_key, own_key


def _ends_of_followers(pattern: AttentionPattern, keys: Room) -> Tensor:
    """Of every key that is a node's, the place behind the last node whose path it is on; else 0: int32 [B, keys]."""
    device = keys.places.device
    ends = torch.zeros(pattern.num_rows, keys.length, dtype=torch.int32, device=device)
    paths = _joined([level.path.flatten() for level in pattern.levels], device)
    # Of each node the paths it is on, its own too; -1 is no node.
    followers = torch.zeros_like(keys.places).index_add_(0, paths.clamp(min=0), (paths >= 0).to(paths.dtype))
    ends[keys.rows, keys.places] = (keys.places + followers).int()
    return ends


def _ints(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32).to(device)
