"""Attention in two parts, merged into one softmax: the document prefix, and a rollout's own tokens.

No score outlives a kernel call: saved for the backward pass are queries, keys, values, outputs and one log-normaliser
per query. The document's keys and values are read where they are, by all samples and heads; nothing is copied per
sample. Masked documents are calls of their own on views of their rows and keys.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ebft_mega.attention.pattern import AttentionPattern
from ebft_mega.attention.prefix_kernels import PrefixKernel, prefix_kernel
from ebft_mega.attention.softmax_merge import merge, small_backward, small_forward

# Plans cached: a run has one per pass of a step (document, G - 1 tokens, packed, features), and they repeat every step.
_PLANS = 64
# With document masking plans never repeat: cached for as many micro-batches as a pipeline stage may have in flight.
_MASKED_PLANS = 16
_ALL_ROWS = slice(None)


@dataclass(frozen=True)
class TwoPartAttention:
    """The two-part route; `kernel` None takes the device's own."""

    kernel: PrefixKernel | None = None

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
        """Attend within one pass; see `ebft_mega.attention.routes.AttentionRoute`."""
        kernel = self.kernel or prefix_kernel(document_key.device, document_key.dtype, document_key.shape[-1])
        tensors = (document_query, own_query, document_key, document_value, own_key, own_value)
        outputs: tuple[Tensor, Tensor] = _TwoPart.apply(pattern, kernel, *(_with_dense_rows(t) for t in tensors))
        return outputs


def _with_dense_rows(tensor: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous: torch's flash kernels take that for granted, unchecked."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@dataclass(frozen=True)
class _Span:
    """Neighbouring queries that one kernel call serves."""

    batch: slice  # the rows of the micro-batch that they are in
    queries: slice
    keys: slice  # document keys that any of them sees
    hidden: Tensor  # bool [queries, width]: true where a query must not see one of the last `width` keys


@dataclass(frozen=True)
class _Document:
    """A document whose queries are its first ones, one after another: a causal kernel serves them."""

    batch: slice
    positions: slice  # of queries and keys alike


@dataclass(frozen=True)
class _Plan:
    """The kernel calls of a pattern."""

    causal: tuple[_Document, ...]  # serve the document queries; if there are none, spans do
    document: tuple[_Span, ...]
    rollouts: tuple[_Span, ...]  # queries: rollout-major, then tokens
    own_future: Tensor | None  # bool [Tq, Tk]; None if nothing is hidden


@dataclass(frozen=True)
class _Limits:
    """How many document keys queries see that belong to one document of one row (or of all rows alike)."""

    batch: slice
    first_key: int  # where the document starts
    first_query: int  # how many limits of its row are before
    limits: tuple[int, ...]  # increasing, more than `first_key`


def _plan(pattern: AttentionPattern, edge: int, device: torch.device) -> _Plan:
    """The calls of a pattern; rows of one document each need no masking."""
    if pattern.document_starts is None or all(len(starts) == 1 for starts in pattern.document_starts):
        return _shared_plan(replace(pattern, document_starts=None), edge, device)
    return _masked_plan(pattern, edge, device)


@lru_cache(maxsize=_PLANS)
def _shared_plan(pattern: AttentionPattern, edge: int, device: torch.device) -> _Plan:
    rollouts = (_Limits(_ALL_ROWS, 0, 0, pattern.anchors),) if pattern.own_queries else ()
    per_block = pattern.num_samples * pattern.own_queries
    future = _own_future(pattern, device)
    if _asks_from_the_start(pattern):
        causal = (_Document(_ALL_ROWS, slice(0, len(pattern.document_queries))),)
        return _Plan(causal, (), _spans(rollouts, per_block, edge, device), future)
    document = (_Limits(_ALL_ROWS, 0, 0, pattern.document_limits),)
    return _Plan((), _spans(document, 1, edge, device), _spans(rollouts, per_block, edge, device), future)


@lru_cache(maxsize=_MASKED_PLANS)
def _masked_plan(pattern: AttentionPattern, edge: int, device: torch.device) -> _Plan:
    starts = pattern.document_starts
    assert starts is not None, "a plan of masked documents"
    rollouts: tuple[_Span, ...] = ()
    if pattern.own_queries:
        per_block = pattern.num_samples * pattern.own_queries
        rollouts = _masked_spans(pattern.anchors, starts, per_block, edge, device)
    future = _own_future(pattern, device)
    if _asks_from_the_start(pattern):
        length = len(pattern.document_queries)
        ends = ((*row[1:], length) for row in starts)
        causal = tuple(
            _Document(slice(index, index + 1), slice(start, min(end, length)))
            for index, (row, row_ends) in enumerate(zip(starts, ends, strict=True))
            for start, end in zip(row, row_ends, strict=True)
            if start < length
        )
        return _Plan(causal, (), rollouts, future)
    document = _masked_spans(pattern.document_limits, starts, 1, edge, device)
    return _Plan((), document, rollouts, future)


def _asks_from_the_start(pattern: AttentionPattern) -> bool:
    asking = pattern.document_queries
    return bool(asking) and asking[-1] == len(asking) - 1


def _own_future(pattern: AttentionPattern, device: torch.device) -> Tensor | None:
    num_queries, num_keys = pattern.own_queries, pattern.own_keys
    if num_queries <= 1:
        return None
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).triu(1 + num_keys - num_queries)


@lru_cache(maxsize=_MASKED_PLANS)  # the same for all tokens of a decode
def _masked_spans(
    limits: tuple[int, ...], starts: tuple[tuple[int, ...], ...], queries_each: int, edge: int, device: torch.device
) -> tuple[_Span, ...]:
    """Spans of every row's queries, none across documents; a query is in the document of the last key that it sees."""
    parts = []
    for index, row in enumerate(starts):
        # A limit that is a start belongs to the document before it.
        cuts = [bisect_right(limits, start) for start in row] + [len(limits)]
        for start, (first, end) in zip(row, pairwise(cuts), strict=True):
            if first < end:
                parts.append(_Limits(slice(index, index + 1), start, first, limits[first:end]))
    return _spans(parts, queries_each, edge, device)


def _spans(parts: Sequence[_Limits], queries_each: int, edge: int, device: torch.device) -> tuple[_Span, ...]:
    """Cut queries by increasing limits, `queries_each` per limit, where the ragged edge would exceed `edge` keys."""
    spans = []
    # One copy to the device for all spans: each would wait for it.
    everything = torch.tensor([limit for part in parts for limit in part.limits], dtype=torch.int64, device=device)
    for part, on_device in zip(parts, everything.split([len(part.limits) for part in parts]), strict=True):
        limits, start = part.limits, 0
        while start < len(limits):
            end = start + 1
            while end < len(limits) and limits[end] - limits[start] <= edge:
                end += 1
            per_query = on_device[start:end].repeat_interleave(queries_each)
            hidden = torch.arange(limits[start], limits[end - 1], device=device) >= per_query[:, None]
            first, last = part.first_query + start, part.first_query + end
            queries = slice(first * queries_each, last * queries_each)
            spans.append(_Span(part.batch, queries, slice(part.first_key, limits[end - 1]), hidden))
            start = end
    return tuple(spans)


class _TwoPart(Function):
    """Both parts of both kinds of query as one node of the graph, so that only merged results are saved."""

    @staticmethod
    def forward(
        ctx: Any,
        pattern: AttentionPattern,
        kernel: PrefixKernel,
        document_query: Tensor,
        own_query: Tensor,
        document_key: Tensor,
        document_value: Tensor,
        own_key: Tensor,
        own_value: Tensor,
    ) -> tuple[Tensor, Tensor]:
        plan = _plan(pattern, kernel.edge, document_key.device)
        document = document_key, document_value
        if plan.causal:
            document_out, document_lse = _causal_forward(kernel, plan.causal, document_query, *document)
        else:
            document_out, document_lse = _prefix_forward(kernel, plan.document, document_query, *document)

        own_out, own_lse = _prefix_forward(kernel, plan.rollouts, own_query.flatten(2, 3), *document)
        if plan.rollouts:
            local = small_forward(*_per_rollout(own_query, own_key, own_value), _tiled(plan, own_query, own_key))
            local_out, local_lse = (_flat(part, own_query) for part in local)
            merged, own_lse = merge(own_out, own_lse, local_out, local_lse)
            own_out = merged.to(own_query.dtype)
        own_out = own_out.view(own_query.shape)

        ctx.plan, ctx.kernel = plan, kernel
        ctx.save_for_backward(
            document_query, own_query, *document, own_key, own_value, document_out, document_lse, own_out, own_lse
        )
        return document_out, own_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, document_grad: Tensor, own_grad: Tensor) -> tuple[Tensor | None, ...]:
        plan, kernel = ctx.plan, ctx.kernel
        document_grad, own_grad = _with_dense_rows(document_grad), _with_dense_rows(own_grad)
        document_query, own_query, document_key, document_value, own_key, own_value, *results = ctx.saved_tensors
        document_out, document_lse, own_out, own_lse = results
        # Many calls add to the document's keys, so their sums are wider than a half-precision gradient.
        wide = torch.promote_types(document_key.dtype, torch.float32)
        sums = torch.zeros_like(document_key, dtype=wide), torch.zeros_like(document_value, dtype=wide)
        document = document_key, document_value

        if plan.causal:
            grad_document_query = _causal_backward(
                kernel, plan.causal, document_grad, document_query, *document, document_out, document_lse, sums
            )
        else:
            grad_document_query = _prefix_backward(
                kernel, plan.document, document_grad, document_query, *document, document_out, document_lse, sums
            )

        grad_own_query, grad_own_key, grad_own_value = (
            torch.zeros_like(tensor) for tensor in (own_query, own_key, own_value)
        )
        if plan.rollouts:
            flat_grad, flat_query, flat_out = (tensor.flatten(2, 3) for tensor in (own_grad, own_query, own_out))
            from_prefix = _prefix_backward(
                kernel, plan.rollouts, flat_grad, flat_query, *document, flat_out, own_lse, sums
            )
            query, key, value = _per_rollout(own_query, own_key, own_value)
            grad, out = (_queries_per_rollout(tensor, key.shape[1]) for tensor in (own_grad, own_out))
            lse = _queries_per_rollout(own_lse.unflatten(2, own_query.shape[2:4])[..., None], key.shape[1])[..., 0]
            local = small_backward(grad, query, key, value, out, lse, _tiled(plan, own_query, own_key))
            grad_own_query = (from_prefix + _flat(local[0], own_query)).view(own_query.shape)
            grad_own_key, grad_own_value = local[1], local[2]
        return (
            None,
            None,
            grad_document_query.to(document_query.dtype),
            grad_own_query.to(own_query.dtype),
            *(total.to(document_key.dtype) for total in sums),
            grad_own_key.to(own_key.dtype),
            grad_own_value.to(own_value.dtype),
        )


def _causal_forward(
    kernel: PrefixKernel, documents: tuple[_Document, ...], query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """All document queries' outputs [B, heads, Nd, d] and log-normalisers [B, heads, Nd]."""
    if len(documents) == 1:
        return kernel.causal_forward(query, key[:, :, : query.shape[2]], value[:, :, : query.shape[2]])
    out, lse = _empty_results(query)
    for document in documents:
        batch, positions = document.batch, document.positions
        own = (tensor[batch, :, positions] for tensor in (query, key, value))
        out[batch, :, positions], lse[batch, :, positions] = kernel.causal_forward(*own)
    return out, lse


def _causal_backward(
    kernel: PrefixKernel,
    documents: tuple[_Document, ...],
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    sums: tuple[Tensor, Tensor],
) -> Tensor:
    """The document queries' gradient [B, heads, Nd, d]; what keys and values get is added to `sums`."""
    parts = []
    for document in documents:
        own = (tensor[document.batch, :, document.positions] for tensor in (grad, query, key, value, out, lse))
        grads = kernel.causal_backward(*own)
        for total, part in zip(sums, grads[1:], strict=True):
            total[document.batch, :, document.positions] += part
        parts.append(grads[0])
    if len(parts) == 1:
        return parts[0]
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    for document, part in zip(documents, parts, strict=True):
        grad_query[document.batch, :, document.positions] = part
    return grad_query


def _prefix_forward(
    kernel: PrefixKernel, spans: tuple[_Span, ...], query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """All spans' outputs [B, heads, queries, d] and log-normalisers [B, heads, queries]."""
    out, lse = _empty_results(query)
    for span in spans:
        batch, queries = span.batch, span.queries
        seen = key[batch, :, span.keys], value[batch, :, span.keys]
        out[batch, :, queries], lse[batch, :, queries] = kernel.forward(query[batch, :, queries], *seen, span.hidden)
    return out, lse


def _empty_results(query: Tensor) -> tuple[Tensor, Tensor]:
    """Room for outputs and log-normalisers of queries."""
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    wide = torch.promote_types(query.dtype, torch.float32)
    return out, torch.empty(query.shape[:3], dtype=wide, device=query.device)


def _prefix_backward(
    kernel: PrefixKernel,
    spans: tuple[_Span, ...],
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    sums: tuple[Tensor, Tensor],
) -> Tensor:
    """The queries' gradient [B, heads, queries, d]; what keys and values get is added to `sums`."""
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    for span in spans:
        batch, queries = span.batch, span.queries
        seen = key[batch, :, span.keys], value[batch, :, span.keys]
        parts = out[batch, :, queries], lse[batch, :, queries]
        grads = kernel.backward(grad[batch, :, queries], query[batch, :, queries], *seen, *parts, span.hidden)
        grad_query[batch, :, queries] = grads[0]
        for total, part in zip(sums, grads[1:], strict=True):
            total[batch, :, span.keys] += part
    return grad_query


def _queries_per_rollout(query: Tensor, groups: int) -> Tensor:
    """[B, heads, R, Tq, d] -> [B, groups, R, heads / groups * Tq, d]."""
    return query.unflatten(1, (groups, -1)).transpose(2, 3).flatten(3, 4)


def _per_rollout(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _queries_per_rollout(query, key.shape[1]), key, value


def _flat(tensor: Tensor, query: Tensor) -> Tensor:
    """[B, groups, R, heads / groups * Tq, ...] -> [B, heads, R * Tq, ...], for a query [B, heads, R, Tq, d]."""
    apart = tensor.unflatten(3, (-1, query.shape[3])).transpose(2, 3)  # [B, groups, heads / groups, R, Tq, ...]
    return apart.flatten(1, 2).flatten(2, 3)


def _tiled(plan: _Plan, query: Tensor, key: Tensor) -> Tensor | None:
    """Which of its own keys each query of a rollout does not see, [heads / groups * Tq, Tk]."""
    return None if plan.own_future is None else plan.own_future.repeat(query.shape[1] // key.shape[1], 1)
