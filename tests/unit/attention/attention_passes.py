"""Passes to try attention on: patterns as runs have them, random tensors, and the masked softmax written out."""

import math
from dataclasses import replace

import torch
from hypothesis import strategies as st

from ebft_mega.attention.pattern import AttentionPattern
from ebft_mega.block_plan import BlockPlan

NAMES = ("document_query", "own_query", "document_key", "document_value", "own_key", "own_value")


@st.composite
def patterns(draw):
    """One pass of a run with random geometry, as `shared_patterns`; half of them with masked documents in two rows.

    A row has one document or several, of one token or more, which start anywhere: at anchors, beside them, in targets.
    """
    pattern = draw(shared_patterns())
    if draw(st.booleans()):
        return pattern
    last = max(pattern.document_keys, 1)
    row = st.sets(st.integers(1, last), max_size=last).map(lambda starts: (0, *sorted(starts)))
    return replace(pattern, document_starts=(draw(row), draw(row)))


@st.composite
def shared_patterns(draw):
    """One pass of a run with random geometry: s < G and s > G, one block or several, one sample or several."""
    generate_length = draw(st.integers(1, 5))
    stride, context_length = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    num_blocks, num_samples = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    length = context_length + (num_blocks - 1) * stride + generate_length
    plan = BlockPlan(length, stride, context_length, generate_length, num_samples)
    kinds = ("document", "decode", "packed", "features", "last features", "any")
    kind = draw(st.sampled_from(kinds))
    if kind == "document":
        return AttentionPattern((), num_samples, range(plan.anchors[-1]), length, 0, 0)
    if kind == "decode":
        return AttentionPattern(
            plan.anchors, num_samples, (), plan.anchors[-1], 1, draw(st.integers(1, generate_length))
        )
    if kind == "packed":
        scored = generate_length - 1
        return AttentionPattern(plan.anchors, num_samples, range(plan.anchors[-1]), plan.anchors[-1], scored, scored)
    if kind == "features":
        everything = range(length)
        return AttentionPattern(plan.anchors, num_samples, everything, length, generate_length, generate_length)
    pooled = tuple(anchor + generate_length - 1 for anchor in plan.anchors)
    if kind == "last features":
        return AttentionPattern(plan.anchors, num_samples, pooled, length, 1, generate_length)
    asking = tuple(sorted(draw(st.sets(st.integers(0, length - 1)))))
    own_keys = draw(st.integers(0, 5))
    return AttentionPattern(plan.anchors, num_samples, asking, length, draw(st.integers(0, own_keys)), own_keys)


def shapes(pattern, rows, heads, groups, head_dim):
    """Of the six tensors of a pass, by name."""
    rollouts = pattern.num_rollouts
    return {
        "document_query": (rows, heads, len(pattern.document_queries), head_dim),
        "own_query": (rows, heads, rollouts, pattern.own_queries, head_dim),
        "document_key": (rows, groups, pattern.document_keys, head_dim),
        "document_value": (rows, groups, pattern.document_keys, head_dim),
        "own_key": (rows, groups, rollouts, pattern.own_keys, head_dim),
        "own_value": (rows, groups, rollouts, pattern.own_keys, head_dim),
    }


def random_tensors(pattern, *, rows=2, heads=4, groups=2, head_dim=4, dtype=torch.float64, seed=0, requires_grad=True):
    """A pass's tensors in the order that routes take them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = shapes(pattern, rows, heads, groups, head_dim)
    drawn = (torch.randn(*sizes[name], generator=generator, dtype=torch.float64) for name in NAMES)
    return [(2 * tensor).to(dtype).requires_grad_(requires_grad) for tensor in drawn]


def naive_attend(pattern, document_query, own_query, document_key, document_value, own_key, own_value):
    """The masked softmax of all queries over all keys."""
    query = torch.cat((document_query, own_query.flatten(2, 3)), dim=2)
    key = torch.cat((document_key, own_key.flatten(2, 3)), dim=2)
    value = torch.cat((document_value, own_value.flatten(2, 3)), dim=2)
    per_group = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(per_group, dim=1) for tensor in (key, value))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    weights = scores.masked_fill(~pattern.mask(query.device), -math.inf).softmax(-1)
    out = weights @ value
    split = document_query.shape[2]
    return out[:, :, :split], out[:, :, split:].unflatten(2, own_query.shape[2:4])


def values_and_gradients(attend, pattern, tensors, seed=1):
    """Both outputs and all six gradients of a random weighted sum of the outputs, by name."""
    outputs = attend(pattern, *tensors)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype) for out in outputs]
    loss = sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True))
    gradients = torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)
    return dict(zip(("document_out", "own_out", *NAMES), (*outputs, *gradients), strict=True))


def assert_same(found, expected, tolerance):
    """Every tensor within `tolerance` times its largest expected value."""
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        if tensor.numel():
            error = (found[name].double() - tensor.double()).abs().max().item()
            scale = max(tensor.abs().max().item(), 1.0)
            assert error <= tolerance * scale, f"{name}: off by {error:.1e}"
