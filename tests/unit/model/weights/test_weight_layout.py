"""Parameters against naive packing of Hugging Face tensors, and boxes that make up their sources exactly."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.partition import valid_tensor_parallel_sizes
from ebft_mega.architecture.tensor_shapes import hf_shapes
from ebft_mega.architecture.vocabulary_blocks import padded_vocabulary
from ebft_mega.model.weights.weight_layout import packing_of
from tests.conftest import tiny_config

PARAMETERS = (
    *("embedding.weight", "head.weight", "final_norm.weight"),
    *("layers.1.input_layernorm.weight", "layers.1.pre_mlp_layernorm.weight"),
    *("layers.1.self_attention.linear_qkv.weight", "layers.1.self_attention.linear_proj.weight"),
    *("layers.1.mlp.linear_fc1.weight", "layers.1.mlp.linear_fc2.weight"),
)
EXTRA = {
    "qwen2": ("layers.1.self_attention.linear_qkv.bias",),
    "qwen3": ("layers.1.self_attention.q_layernorm.weight", "layers.1.self_attention.k_layernorm.weight"),
}


def sources_of(packing, architecture):
    """Tensors in which every element is another number, over all of a parameter's sources."""
    first = 1
    for name in packing.sources:
        shape = hf_shapes(architecture)[name]
        count = torch.Size(shape).numel()
        yield torch.arange(first, first + count, dtype=torch.float32).view(shape)
        first += count


@given(
    kind=st.sampled_from(("llama", "mistral", "qwen2", "qwen3")),
    tied=st.booleans(),
    groups=st.sampled_from((1, 2, 4)),
    vocab_size=st.integers(1, 300),
    choice=st.integers(0, 100),
    parameter=st.integers(0, 100),
)
def test_boxes_of_all_ranks_are_the_sources(kind, tied, groups, vocab_size, choice, parameter):
    config = tiny_config(kind, tied, num_key_value_heads=groups, vocab_size=vocab_size)
    architecture = Architecture.from_hf(config, "test")
    sizes = valid_tensor_parallel_sizes(architecture)
    ranks = sizes[choice % len(sizes)]
    names = PARAMETERS + EXTRA.get(kind, ())
    packing = packing_of(names[parameter % len(names)], architecture, 2, ranks)
    sources = tuple(sources_of(packing, architecture))
    parameters, seen = [], [torch.zeros_like(source) for source in sources]
    for rank in range(ranks):
        boxes = [packing.box(source.shape, rank) for source in sources]
        parts = tuple(source[box] for source, box in zip(sources, boxes, strict=True))
        parameters.append(packing.pack(parts))
        for part, again in zip(parts, packing.unpack(parameters[-1], rank), strict=True):
            assert torch.equal(part, again)
        for counts, box in zip(seen, boxes, strict=True):
            counts[box] += 1
    whole_on_each = packing.dim is None
    assert all(bool((counts == (ranks if whole_on_each else 1)).all()) for counts in seen)
    for source, again in zip(sources, packing.whole(parameters), strict=True):
        assert torch.equal(source, again)
    if packing.vocab_size is not None:
        padded = torch.cat(parameters)
        assert len(padded) == padded_vocabulary(vocab_size, ranks)
        assert not padded[vocab_size:].any()


@pytest.mark.parametrize("ranks", [1, 2])
def test_query_key_and_value_rows_lie_together_per_group(ranks):
    """megatron-core's order, spelled out row by row: of each key-value group its queries, its key, its value."""
    architecture = Architecture.from_hf(tiny_config("qwen2"), "test")
    dim, heads, groups = architecture.head_dim, architecture.num_attention_heads, architecture.num_key_value_heads
    for kind in ("weight", "bias"):
        packing = packing_of(f"layers.0.self_attention.linear_qkv.{kind}", architecture, 1, ranks)
        assert packing.sources == tuple(f"model.layers.1.self_attn.{name}_proj.{kind}" for name in "qkv")
        query, key, value = sources_of(packing, architecture)
        for rank in range(ranks):
            rows = []
            for group in range(rank * groups // ranks, (rank + 1) * groups // ranks):
                for head in range(group * heads // groups, (group + 1) * heads // groups):
                    rows += [query[head * dim + row] for row in range(dim)]
                rows += [key[group * dim + row] for row in range(dim)]
                rows += [value[group * dim + row] for row in range(dim)]
            parts = tuple(source[packing.box(source.shape, rank)] for source in (query, key, value))
            assert torch.equal(packing.pack(parts), torch.stack(rows))


def test_a_rank_with_part_of_a_head():
    """More ranks than key-value heads: a rank's queries, then its rows of one key head and of one value head."""
    architecture = Architecture.from_hf(tiny_config("llama", num_key_value_heads=1), "test")
    packing = packing_of("layers.0.self_attention.linear_qkv.weight", architecture, 0, 4)
    query, key, value = sources_of(packing, architecture)
    for rank in range(4):
        parts = tuple(source[packing.box(source.shape, rank)] for source in (query, key, value))
        wanted = torch.cat((query[rank * 8 : rank * 8 + 8], key[rank * 2 : rank * 2 + 2], value[rank * 2 :][:2]))
        assert torch.equal(packing.pack(parts), wanted)


def test_the_gate_lies_above_the_up_projection():
    architecture = Architecture.from_hf(tiny_config("llama"), "test")
    packing = packing_of("layers.0.mlp.linear_fc1.weight", architecture, 0, 2)
    gate, up = sources_of(packing, architecture)
    parts = tuple(source[packing.box(source.shape, 1)] for source in (gate, up))
    assert torch.equal(packing.pack(parts), torch.cat((gate[24:], up[24:])))


def test_projections_back_are_cut_by_columns():
    architecture = Architecture.from_hf(tiny_config("llama"), "test")
    for parameter in ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight"):
        packing = packing_of(f"layers.0.{parameter}", architecture, 0, 2)
        (source,) = sources_of(packing, architecture)
        half = source.shape[1] // 2
        assert torch.equal(packing.pack((source[packing.box(source.shape, 1)],)), source[:, half:])


def test_a_tied_head_is_the_embedding():
    for tied, source in ((True, "model.embed_tokens.weight"), (False, "lm_head.weight")):
        architecture = Architecture.from_hf(tiny_config("llama", tied), "test")
        assert packing_of("head.weight", architecture, 0, 1).sources == (source,)
