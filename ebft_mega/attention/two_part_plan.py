"""The kernel calls that two-part attention makes for a pattern: which neighbouring queries share which keys."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ebft_mega.attention.pattern import AttentionPattern
from ebft_mega.forest import Level

# Plans cached: a run has one per pass of a step (document, G - 1 tokens, packed, features), and they repeat every step.
_PLANS = 64
# Those of masked documents and merged rollouts never repeat: cached for the layers of a pass, and for the micro-batch
# whose backward pass takes turns with another's forward pass.
_PASSING_PLANS = 4
_ALL_ROWS = slice(None)


@dataclass(frozen=True)
class Span:
    """Neighbouring queries that one kernel call serves."""

    asking: slice  # the rows of the queries' tensor that they are in
    queries: slice
    batch: slice  # the rows whose document they see
    keys: slice  # document keys that any of them sees
    hidden: Tensor  # bool [queries, width]: true where a query must not see one of the last `width` keys


@dataclass(frozen=True)
class CausalDocument:
    """A document whose queries are its first ones, one after another: a causal kernel serves them."""

    batch: slice
    positions: slice  # of queries and keys alike


@dataclass(frozen=True)
class OwnPaths:
    """The nodes of one level that ask."""

    queries: slice  # among the asking nodes, level by level
    keys: Tensor  # int64 [N * T], T nodes on the path of each; any where there is none
    length: int  # T
    hidden: Tensor | None  # bool [N, 1, T], true where there is none; None: nowhere


@dataclass(frozen=True)
class Plan:
    """The kernel calls of a pattern."""

    causal: tuple[CausalDocument, ...]  # serve the document queries; if there are none, spans do
    document: tuple[Span, ...]
    # Nodes for the prefix are by row, block and level: int64, of each its place level by level; None: it is the same.
    by_row: Tensor | None
    to_levels: Tensor | None  # the inverse
    rows_asking: int  # B where the nodes of all rows are served by the same calls, else 1
    nodes: tuple[Span, ...]
    paths: tuple[OwnPaths, ...]


@dataclass(frozen=True)
class _Limits:
    """How many document keys queries see that belong to one document of one row (or of all rows alike)."""

    asking: slice
    batch: slice
    first_key: int  # where the document starts
    limits: tuple[int, ...]  # increasing, more than `first_key`
    starts: tuple[int, ...]  # of each limit its first query, and the end of the last one's: one number more


def plan_of(pattern: AttentionPattern, edge: int, device: torch.device) -> Plan:
    """The calls of a pattern.

    Args:
        edge: most keys of a call's ragged edge, which some of its queries must not see.
    Communication: none; what is hidden is copied to the device once per plan.
    """
    return (_repeated_plan if pattern.is_shared else _passing_plan)(pattern, edge, device)


def _make_plan(pattern: AttentionPattern, edge: int, device: torch.device) -> Plan:
    causal: tuple[CausalDocument, ...] = ()
    document: tuple[Span, ...] = ()
    if _asks_from_the_start(pattern):
        causal = _causal_documents(pattern)
    elif pattern.document_queries:
        limits = _on_device(pattern.document_limits, device)
        document = _spans(_document_limits(pattern), limits, edge)
    by_row, to_levels = _orders(pattern.asking_levels)
    nodes: tuple[Span, ...] = ()
    if pattern.asking:
        limits = _limits_of_nodes(pattern, device)
        limits = limits if by_row is None else limits[by_row]
        nodes = _spans(_node_limits(pattern), limits, edge, pattern.longest_branch, pattern.document_keys)
    ends = list(accumulate(map(len, pattern.asking_levels), initial=0))
    paths = tuple(
        _own_paths(slice(first, end), level)
        for level, (first, end) in zip(pattern.asking_levels, pairwise(ends), strict=True)
    )
    return Plan(causal, document, by_row, to_levels, _rows_asking(pattern), nodes, paths)


_repeated_plan = lru_cache(maxsize=_PLANS)(_make_plan)
_passing_plan = lru_cache(maxsize=_PASSING_PLANS)(_make_plan)


def _own_paths(queries: slice, level: Level) -> OwnPaths:
    length = level.path.shape[1]
    if level.is_separate:
        return OwnPaths(queries, level.path.flatten(), length, None)
    return OwnPaths(queries, level.path.clamp(min=0).flatten(), length, (level.path < 0)[:, None])


def _asks_from_the_start(pattern: AttentionPattern) -> bool:
    asking = pattern.document_queries
    return bool(asking) and asking[-1] == len(asking) - 1


def _has_whole_rows(pattern: AttentionPattern) -> bool:
    """Whether every row is one document."""
    return pattern.document_starts is None or all(len(starts) == 1 for starts in pattern.document_starts)


def _rows_asking(pattern: AttentionPattern) -> int:
    """B where the nodes of all rows are served by the same calls, else 1."""
    return pattern.num_rows if _has_whole_rows(pattern) and pattern.rows_are_alike else 1


def _causal_documents(pattern: AttentionPattern) -> tuple[CausalDocument, ...]:
    length = len(pattern.document_queries)
    if _has_whole_rows(pattern):
        return (CausalDocument(_ALL_ROWS, slice(0, length)),)
    return tuple(
        CausalDocument(slice(row, row + 1), slice(start, min(end, length)))
        for row in range(pattern.num_rows)
        for start, end in pairwise((*pattern.starts_of(row), length))
        if start < length
    )


def _limits_of_nodes(pattern: AttentionPattern, device: torch.device) -> Tensor:
    """How many document keys each asking node sees, level by level, int64 [Nq]."""
    anchors = _on_device(pattern.anchors, device)
    return torch.cat([anchors[level.node_anchors % len(anchors)] + level.branch for level in pattern.asking_levels])


@lru_cache(maxsize=16)  # a copy would wait for the device, and these are the same in every step
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def _document_limits(pattern: AttentionPattern) -> list[_Limits]:
    """Of the document queries."""
    starts = tuple(range(len(pattern.document_queries) + 1))
    if _has_whole_rows(pattern):
        return [_Limits(_ALL_ROWS, _ALL_ROWS, 0, pattern.document_limits, starts)]
    found = []
    for row in range(pattern.num_rows):
        own = slice(row, row + 1)
        found += _by_document(_Limits(own, own, 0, pattern.document_limits, starts), pattern.starts_of(row))
    return found


def _node_limits(pattern: AttentionPattern) -> list[_Limits]:
    """Of the asking nodes, by row, block and level."""
    blocks, counts = len(pattern.anchors), pattern.nodes_per_anchor
    if _rows_asking(pattern) > 1 or pattern.num_rows == 1 and _has_whole_rows(pattern):
        starts = tuple(accumulate(counts[:blocks], initial=0))
        return [_Limits(_ALL_ROWS, _ALL_ROWS, 0, pattern.anchors, starts)]
    found = []
    ends = tuple(accumulate(counts, initial=0))
    for row in range(pattern.num_rows):
        starts = ends[row * blocks : (row + 1) * blocks + 1]
        whole = _Limits(_ALL_ROWS, slice(row, row + 1), 0, pattern.anchors, starts)
        found += _by_document(whole, pattern.starts_of(row))
    return found


def _by_document(whole: _Limits, documents: tuple[int, ...]) -> list[_Limits]:
    """Cut a row's queries at its documents; a query is in the document of the last key that it sees."""
    # A limit that is a start belongs to the document before it.
    cuts = [bisect_right(whole.limits, start) for start in documents] + [len(whole.limits)]
    return [
        _Limits(whole.asking, whole.batch, start, whole.limits[first:end], whole.starts[first : end + 1])
        for start, (first, end) in zip(documents, pairwise(cuts), strict=True)
        if first < end
    ]


def _orders(levels: Sequence[Level]) -> tuple[Tensor | None, Tensor | None]:
    """The order of nodes by row, block and level, of nodes that are level by level; and its inverse."""
    if len(levels) < 2:
        return None, None
    by_row = torch.cat([level.node_anchors for level in levels]).argsort(stable=True)
    to_levels = torch.empty_like(by_row).scatter_(0, by_row, torch.arange(len(by_row), device=by_row.device))
    return by_row, to_levels


def _spans(
    parts: Sequence[_Limits], limit_of_query: Tensor, edge: int, beyond: int = 0, last: int | None = None
) -> tuple[Span, ...]:
    """Cut queries by increasing limits where the ragged edge would exceed `edge` keys.

    Args:
        limit_of_query: int64, on the device, how many keys each query sees: its limit, or up to `beyond` more.
        last: no key is behind that; None: there are as many as the limits say.
    """
    spans = []
    device = limit_of_query.device
    for part in parts:
        limits, start = part.limits, 0
        while start < len(limits):
            end = start + 1
            while end < len(limits) and limits[end] - limits[start] <= edge:
                end += 1
            queries = slice(part.starts[start], part.starts[end])
            most = limits[end - 1] + beyond
            most = most if last is None else min(most, last)
            if queries.start < queries.stop:
                hidden = torch.arange(limits[start], most, device=device) >= limit_of_query[queries, None]
                spans.append(Span(part.asking, queries, part.batch, slice(part.first_key, most), hidden))
            start = end
    return tuple(spans)
