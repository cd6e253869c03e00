"""Merge attention over disjoint sets of keys into one softmax, through the log-sum-exp of each.

With l_i = log sum_j exp(s_ij) over the keys j of a part and o_i the part's own softmax average, the softmax over two
disjoint parts has l = log(exp(l1) + exp(l2)) and o = exp(l1 - l) o1 + exp(l2 - l) o2. Backwards a part needs only the
merged pair: its weights are exp(s_ij - l_i), and the softmax's correction is the row sum of grad * o in every part.
"""

import math

import torch
from torch import Tensor


def merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """One softmax from two disjoint parts of its keys.

    Args:
        out, other_out: [..., rows, d], each part's own softmax average.
        lse, other_lse: [..., rows], each part's log-normaliser; -inf where a part has no key, not in both.
    Returns:
        ([..., rows, d], [..., rows]) in the dtype of the log-normalisers.
    Communication: none.
    """
    merged = torch.logaddexp(lse, other_lse)
    return out * (lse - merged).exp()[..., None] + other_out * (other_lse - merged).exp()[..., None], merged


def small_forward(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention over few keys, with all scores written out.

    Args:
        query: [..., rows, d]; key, value: [..., keys, d].
        hidden: bool [rows, keys] or a shape that broadcasts, true where a query must not look; None: sees all.
    Returns:
        (average [..., rows, d], log-normaliser [..., rows]), float32 or wider; 0 and -inf where all is hidden.
    Communication: none.
    """
    scores = _scores(query, key, hidden)
    lse = scores.logsumexp(-1)
    return _weights(scores, lse) @ value.to(scores.dtype), lse


def small_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, hidden: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one part of a softmax, given the whole softmax's result.

    Args:
        grad, out: [..., rows, d], of the merged output; lse: [..., rows], merged.
        query, key, value, hidden: as in `small_forward`.
    Returns:
        gradients of query, key and value, float32 or wider.
    Communication: none.
    """
    scores = _scores(query, key, hidden)
    wide = scores.dtype
    weights = _weights(scores, lse)
    grad = grad.to(wide)
    correction = (grad * out).sum(-1, keepdim=True)
    grad_scores = (grad @ value.to(wide).transpose(-1, -2)).sub_(correction).mul_(weights)
    grad_scores.mul_(1 / math.sqrt(query.shape[-1]))
    grad_query = grad_scores @ key.to(wide)
    grad_key = grad_scores.transpose(-1, -2) @ query.to(wide)
    return grad_query, grad_key, weights.transpose(-1, -2) @ grad


def _scores(query: Tensor, key: Tensor, hidden: Tensor | None) -> Tensor:
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(wide) @ key.to(wide).transpose(-1, -2)).mul_(1 / math.sqrt(query.shape[-1]))
    return scores if hidden is None else scores.masked_fill_(hidden, -math.inf)


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse) in place of the scores; a row without any key gets zeros rather than inf - inf."""
    return scores.sub_(lse.clamp(min=torch.finfo(lse.dtype).min)[..., None]).exp_()
