"""Attention in two parts, merged into one softmax: the document prefix, and a rollout's own tokens.

No score outlives a kernel call: kept for the backward pass are queries, keys, values, outputs and one log-normaliser
per query. The document's keys and values are read where they are, by all samples and heads; nothing is copied per
sample.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ebft_mega.attention.parts import merge, small_backward, small_forward
from ebft_mega.attention.pattern import AttentionPattern
from ebft_mega.attention.prefix_kernels import PrefixKernel, prefix_kernel

# Plans kept: a run has one per pass of a step (document, G - 1 tokens, packed, features), and they repeat every step.
_PLANS = 64


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

    rows: slice
    num_keys: int  # document keys that any of them sees
    hidden: Tensor  # bool [rows, width]: who does not see which of the last keys


@dataclass(frozen=True)
class _Plan:
    """What a pattern's calls are."""

    causal: int  # document queries 0..causal-1 that a causal kernel serves; else 0 and there are spans
    document: tuple[_Span, ...]
    rollouts: tuple[_Span, ...]  # rows: rollout-major, then tokens
    own_future: Tensor | None  # bool [Tq, Tk]; None if nothing is hidden


@lru_cache(maxsize=_PLANS)
def _plan(pattern: AttentionPattern, edge: int, device: torch.device) -> _Plan:
    asking, num_queries, num_keys = pattern.document_queries, pattern.own_queries, pattern.own_keys
    causal = len(asking) if asking and asking[-1] == len(asking) - 1 else 0
    document = () if causal else _spans(pattern.document_limits, 1, edge, device)
    rollouts = _spans(pattern.anchors, pattern.num_samples * num_queries, edge, device) if num_queries else ()
    future = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).triu(1 + num_keys - num_queries)
    return _Plan(causal, document, rollouts, future if num_queries > 1 else None)


def _spans(limits: tuple[int, ...], rows_each: int, edge: int, device: torch.device) -> tuple[_Span, ...]:
    """Cut queries by increasing limits, `rows_each` per limit, where the ragged edge would grow beyond `edge` keys."""
    spans = []
    start = 0
    while start < len(limits):
        end = start + 1
        while end < len(limits) and limits[end] - limits[start] <= edge:
            end += 1
        per_row = torch.tensor(limits[start:end], device=device).repeat_interleave(rows_each)
        hidden = torch.arange(limits[start], limits[end - 1], device=device) >= per_row[:, None]
        spans.append(_Span(slice(start * rows_each, end * rows_each), limits[end - 1], hidden))
        start = end
    return tuple(spans)


class _TwoPart(Function):
    """Both parts of both kinds of query as one node of the graph, so that only merged results are kept."""

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
            seen = (tensor[:, :, : plan.causal] for tensor in document)
            document_out, document_lse = kernel.causal_forward(document_query, *seen)
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
            seen = (tensor[:, :, : plan.causal] for tensor in document)
            grads = kernel.causal_backward(document_grad, document_query, *seen, document_out, document_lse)
            grad_document_query = grads[0]
            for total, part in zip(sums, grads[1:], strict=True):
                total[:, :, : plan.causal] += part
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


def _prefix_forward(
    kernel: PrefixKernel, spans: tuple[_Span, ...], query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """All spans' outputs [B, heads, rows, d] and log-normalisers [B, heads, rows]."""
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
    for span in spans:
        seen = key[:, :, : span.num_keys], value[:, :, : span.num_keys]
        out[:, :, span.rows], lse[:, :, span.rows] = kernel.forward(query[:, :, span.rows], *seen, span.hidden)
    return out, lse


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
    """The queries' gradient [B, heads, rows, d]; what keys and values get is added to `sums`."""
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    for span in spans:
        rows = span.rows
        seen = key[:, :, : span.num_keys], value[:, :, : span.num_keys]
        parts = out[:, :, rows], lse[:, :, rows]
        grads = kernel.backward(grad[:, :, rows], query[:, :, rows], *seen, *parts, span.hidden)
        grad_query[:, :, rows] = grads[0]
        for total, part in zip(sums, grads[1:], strict=True):
            total[:, :, : span.num_keys] += part
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
