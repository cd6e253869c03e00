"""Passes to try attention on: patterns as runs have them, random tensors, and the masked softmax written out."""

import math

import torch
from hypothesis import strategies as st

from ebft_mega.attention.pattern import AttentionPattern
from ebft_mega.block_plan import BlockPlan
from ebft_mega.forest import Forest

NAMES = ("document_query", "own_query", "document_key", "document_value", "own_key", "own_value")


def forest_of(rows, blocks, samples, length, merges=True, vocabularies=(2,), seed=0, held=None):
    """Random rollouts as a forest; anchor after anchor takes the next of `vocabularies`, 1 makes its rollouts equal.

    Args:
        held: bool [B, K, G], whether the document has a token there that a rollout may equal: it is 0; None: nowhere.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor(vocabularies).repeat(rows * blocks)[: rows * blocks].view(rows, 1, blocks, 1)
    tokens = (torch.rand(rows, samples, blocks, length, generator=generator) * sizes).long()
    continuations = None if held is None else torch.where(held, 0, -1).flatten(0, 1)
    return Forest.of(tokens, merges, continuations)


def held_by(anchors, length, document_keys, starts):
    """Where a pass has a document position that continues an anchor's document, bool [B, K, G].

    Args:
        starts: of each row the first position of every document.
    """
    return torch.tensor(
        [
            [[a + t < document_keys and not any(a <= s <= a + t for s in row) for t in range(length)] for a in anchors]
            for row in starts
        ]
    )


@st.composite
def patterns(draw):
    """One pass of a run with random geometry: s < G and s > G, one to three rows, one block, sample, level or several.

    From all rollouts of an anchor equal, or equal to the document, to all of them different, anchor by anchor; or
    nothing merged. In half of them documents are masked: a row has one document or several, of one token or more, which
    start anywhere: at anchors, beside them, in targets.
    """
    generate_length = draw(st.integers(1, 5))
    stride, context_length = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    rows, blocks, samples = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 4))
    length = context_length + (blocks - 1) * stride + generate_length
    plan = BlockPlan(length, stride, context_length, generate_length, samples)
    starts = None
    if draw(st.booleans()):
        row = st.sets(st.integers(1, length), max_size=length).map(lambda found: (0, *sorted(found)))
        starts = tuple(draw(row) for _ in range(rows))
    held = None
    if draw(st.booleans()):
        held = held_by(plan.anchors, generate_length, plan.anchors[-1], starts or ((0,),) * rows)
    vocabularies = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 1000]), min_size=1, max_size=5)))
    merges, seed = draw(st.booleans()), draw(st.integers(0, 99))
    forest = forest_of(rows, blocks, samples, generate_length, merges, vocabularies, seed, held)
    return AttentionPattern(rows, plan.anchors, *draw(passes(plan, forest)), starts)


@st.composite
def passes(draw, plan, forest):
    """Document queries, document keys, levels and asking levels of one of a run's passes, or of any other."""
    length, generate_length, end = plan.sequence_length, plan.generate_length, plan.anchors[-1]
    kind = draw(st.sampled_from(("document", "decode", "packed", "features", "last features", "any")))
    if kind == "document":
        return range(end), length, (), 0
    if kind == "decode":
        return (), end, forest.levels[: draw(st.integers(1, generate_length))], 1
    if kind == "packed":
        return range(end), end, forest.levels[:-1], generate_length - 1
    if kind == "features":
        return range(length), length, forest.levels, generate_length
    if kind == "last features":
        return tuple(anchor + generate_length - 1 for anchor in plan.anchors), length, forest.levels, 1
    queries = tuple(sorted(draw(st.sets(st.integers(0, length - 1)))))
    levels = forest.levels[: draw(st.integers(0, generate_length))]
    return queries, length, levels, draw(st.integers(0, len(levels)))


def shapes(pattern, heads, groups, head_dim):
    """Of the six tensors of a pass, by name."""
    rows = pattern.num_rows
    return {
        "document_query": (rows, heads, len(pattern.document_queries), head_dim),
        "own_query": (heads, pattern.own_queries, head_dim),
        "document_key": (rows, groups, pattern.document_keys, head_dim),
        "document_value": (rows, groups, pattern.document_keys, head_dim),
        "own_key": (groups, pattern.own_keys, head_dim),
        "own_value": (groups, pattern.own_keys, head_dim),
    }


def random_tensors(pattern, *, heads=4, groups=2, head_dim=4, dtype=torch.float64, seed=0, requires_grad=True):
    """A pass's tensors in the order that routes take them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = shapes(pattern, heads, groups, head_dim)
    drawn = (torch.randn(*sizes[name], generator=generator, dtype=torch.float64) for name in NAMES)
    return [(2 * tensor).to(dtype).requires_grad_(requires_grad) for tensor in drawn]


def naive_attend(pattern, document_query, own_query, document_key, document_value, own_key, own_value):
    """The masked softmax of all queries of a row over all its keys, row by row."""
    on_documents, on_nodes = [], torch.full_like(own_query, math.nan)
    per_group = document_query.shape[1] // document_key.shape[1]
    for row in range(pattern.num_rows):
        asking, nodes = pattern.nodes_of(row, asking=True), pattern.nodes_of(row)
        query = torch.cat((document_query[row], own_query[:, asking]), dim=1)
        key = torch.cat((document_key[row], own_key[:, nodes]), dim=1).repeat_interleave(per_group, dim=0)
        value = torch.cat((document_value[row], own_value[:, nodes]), dim=1).repeat_interleave(per_group, dim=0)
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        out = scores.masked_fill(~pattern.mask(row, query.device), -math.inf).softmax(-1) @ value
        on_documents.append(out[:, : document_query.shape[2]])
        on_nodes = on_nodes.index_copy(1, asking, out[:, document_query.shape[2] :])
    return torch.stack(on_documents), on_nodes


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
