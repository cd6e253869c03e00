"""Attention in two parts, merged into one softmax: the document prefix, and a node's own path.

No score outlives a kernel call: saved for the backward pass are queries, keys, values, outputs and one log-normaliser
per query. The document's keys and values are read where they are, by all nodes and heads; nothing of it is copied.
Masked documents are calls of their own on views of their rows and keys, and so are rows whose anchors have different
numbers of nodes. Of the nodes on a path, which are few, keys and values are gathered, a level at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ebft_mega.attention.pattern import AttentionPattern
from ebft_mega.attention.prefix_kernels import PrefixKernel, prefix_kernel
from ebft_mega.attention.softmax_merge import merge, small_backward, small_forward
from ebft_mega.attention.two_part_plan import CausalDocument, OwnPaths, Plan, Span, plan_of


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
        plan = plan_of(pattern, kernel.edge, document_key.device)
        document = document_key, document_value
        if plan.causal:
            document_out, document_lse = _causal_forward(kernel, plan.causal, document_query, *document)
        else:
            document_out, document_lse = _prefix_forward(kernel, plan.document, document_query, *document)

        own_out, own_lse = own_query, own_query.new_empty(0)
        if plan.nodes:
            from_prefix = _prefix_forward(kernel, plan.nodes, _to_rows(plan, own_query), *document)
            out, lse = (_to_levels(plan, part) for part in from_prefix)
            merged, own_lse = merge(out, lse, *_paths_forward(plan, own_query, own_key, own_value))
            own_out = merged.to(own_query.dtype)

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

        own_sums = torch.zeros_like(own_key, dtype=wide), torch.zeros_like(own_value, dtype=wide)
        grad_own_query = torch.zeros_like(own_query)
        if plan.nodes:
            grad, query, out, lse = (_to_rows(plan, t) for t in (own_grad, own_query, own_out, own_lse))
            from_prefix = _prefix_backward(kernel, plan.nodes, grad, query, *document, out, lse, sums)
            grad_own_query = _to_levels(plan, from_prefix) + _paths_backward(
                plan, own_grad, own_query, own_key, own_value, own_out, own_lse, own_sums
            )
        return (
            None,
            None,
            grad_document_query.to(document_query.dtype),
            grad_own_query.to(own_query.dtype),
            *(total.to(document_key.dtype) for total in sums),
            *(total.to(own_key.dtype) for total in own_sums),
        )


def _to_rows(plan: Plan, values: Tensor) -> Tensor:
    """Nodes level by level, [heads, Nq, ...], by row, block and level: [1 or B, heads, Nq or Nq / B, ...]."""
    sorted_values = values if plan.by_row is None else values.index_select(1, plan.by_row)
    return sorted_values.unflatten(1, (plan.rows_asking, -1)).transpose(0, 1)


def _to_levels(plan: Plan, values: Tensor) -> Tensor:
    """The inverse of `_to_rows`."""
    together = values.transpose(0, 1).flatten(1, 2)
    return together if plan.to_levels is None else together.index_select(1, plan.to_levels)


def _paths_forward(plan: Plan, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of nodes over their own paths: averages [heads, Nq, d] and log-normalisers [heads, Nq]."""
    outs, normalizers = [], []
    for own in plan.paths:
        out, lse = small_forward(*_on_paths(own, query, key, value), own.hidden)
        outs.append(_from_groups(out))
        normalizers.append(_from_groups(lse))
    return torch.cat(outs, dim=1), torch.cat(normalizers, dim=1)


def _paths_backward(
    plan: Plan,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    sums: tuple[Tensor, Tensor],
) -> Tensor:
    """The queries' gradient [heads, Nq, d]; what the nodes' keys and values get is added to `sums`."""
    parts = []
    for own in plan.paths:
        asking, keys, values = _on_paths(own, query, key, value)
        grads, outs, normalizers = (_by_group(own, tensor, len(key)) for tensor in (grad, out, lse))
        towards_query, *others = small_backward(grads, asking, keys, values, outs, normalizers, own.hidden)
        parts.append(_from_groups(towards_query))
        for total, towards in zip(sums, others, strict=True):
            total.index_add_(1, own.keys, towards.flatten(1, 2).to(total.dtype))
    return torch.cat(parts, dim=1)


def _on_paths(own: OwnPaths, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A level's queries [groups, N, heads / groups, d], and the keys and values of their paths [groups, N, T, d]."""
    gathered = (tensor.index_select(1, own.keys).unflatten(1, (-1, own.length)) for tensor in (key, value))
    return (_by_group(own, query, len(key)), *gathered)


def _by_group(own: OwnPaths, values: Tensor, groups: int) -> Tensor:
    """Of a level's nodes, [heads, Nq, ...] -> [groups, N, heads / groups, ...]."""
    return values[:, own.queries].unflatten(0, (groups, -1)).transpose(1, 2)


def _from_groups(values: Tensor) -> Tensor:
    """[groups, N, heads / groups, ...] -> [heads, N, ...]."""
    return values.transpose(1, 2).flatten(0, 1)


def _causal_forward(
    kernel: PrefixKernel, documents: tuple[CausalDocument, ...], query: Tensor, key: Tensor, value: Tensor
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
    documents: tuple[CausalDocument, ...],
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
    kernel: PrefixKernel, spans: tuple[Span, ...], query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """All spans' outputs [B, heads, queries, d] and log-normalisers [B, heads, queries]."""
    found = [
        kernel.forward(
            query[span.asking, :, span.queries],
            key[span.batch, :, span.keys],
            value[span.batch, :, span.keys],
            span.hidden,
        )
        for span in spans
    ]
    if _are_all_rows(spans):
        return torch.cat([out for out, _ in found], dim=2), torch.cat([lse for _, lse in found], dim=2)
    out, lse = _empty_results(query)
    for span, (part, normalizers) in zip(spans, found, strict=True):
        out[span.asking, :, span.queries], lse[span.asking, :, span.queries] = part, normalizers
    return out, lse


def _are_all_rows(spans: Sequence[Span]) -> bool:
    """Whether the spans, one behind the other, are the queries of all rows of the queries' tensor."""
    return bool(spans) and all(span.asking == slice(None) for span in spans)


def _empty_results(query: Tensor) -> tuple[Tensor, Tensor]:
    """Room for outputs and log-normalisers of queries."""
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    wide = torch.promote_types(query.dtype, torch.float32)
    return out, torch.empty(query.shape[:3], dtype=wide, device=query.device)


def _prefix_backward(
    kernel: PrefixKernel,
    spans: tuple[Span, ...],
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    sums: tuple[Tensor, Tensor],
) -> Tensor:
    """The queries' gradient [B, heads, queries, d]; what keys and values get is added to `sums`."""
    parts = []
    for span in spans:
        asking, queries = span.asking, span.queries
        seen = key[span.batch, :, span.keys], value[span.batch, :, span.keys]
        answers = out[asking, :, queries], lse[asking, :, queries]
        grads = kernel.backward(grad[asking, :, queries], query[asking, :, queries], *seen, *answers, span.hidden)
        parts.append(grads[0])
        for total, part in zip(sums, grads[1:], strict=True):
            total[span.batch, :, span.keys] += part
    if _are_all_rows(spans):
        return torch.cat(parts, dim=2)
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    for span, part in zip(spans, parts, strict=True):
        grad_query[span.asking, :, span.queries] = part
    return grad_query
