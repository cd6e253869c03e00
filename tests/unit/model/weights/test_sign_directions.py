"""Signs against the definition written out, in parts and as the ranks' parameters."""

import hashlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.tensor_shapes import hf_shapes
from ebft_mega.architecture.vocabulary_blocks import padded_vocabulary
from ebft_mega.model.weights.sign_directions import parameter_signs, signs
from ebft_mega.model.weights.weight_layout import packing_of
from tests.conftest import tiny_config
from tests.unit.model.weights.test_weight_layout import EXTRA, PARAMETERS


def naive(direction, name, shape):
    """As the trace's definition says it, one bit after another."""
    digest = hashlib.sha256(f"{direction}:{name}".encode()).digest()
    generator = np.random.Philox(key=sum(digest[byte] << (8 * byte) for byte in range(8)))
    numel = math.prod(shape)
    words = [int(generator.random_raw()) for _ in range(math.ceil(numel / 64))]
    values = [2 * (words[index // 64] >> (index % 64) & 1) - 1 for index in range(numel)]
    return torch.tensor(values, dtype=torch.int8).view(shape)


@given(st.data())
def test_part_of_a_tensor_has_the_signs_of_the_definition(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=2)))
    bounds = [sorted((data.draw(st.integers(0, size)), data.draw(st.integers(0, size)))) for size in shape]
    box = tuple(slice(*each) for each in bounds)
    direction, name = data.draw(st.integers(0, 99)), data.draw(st.sampled_from(("model.norm.weight", "é")))
    expected = naive(direction, name, shape)
    assert torch.equal(signs(direction, name, shape), expected)
    found = signs(direction, name, shape, box)
    assert found.dtype == torch.int8 and torch.equal(found, expected[box])


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("qwen2", False), ("qwen3", True)])
def test_parameters_of_all_ranks_have_the_signs_of_the_whole_tensors(kind, tied, ranks):
    architecture = Architecture.from_hf(tiny_config(kind, tied, num_key_value_heads=2, vocab_size=131), "test")
    shapes = hf_shapes(architecture)
    for parameter in PARAMETERS + EXTRA.get(kind, ()):
        packing = packing_of(parameter, architecture, 1, ranks)
        packed = []
        for rank in range(ranks):
            groups = SimpleNamespace(tensor_parallel_size=ranks, tensor_parallel_rank=rank)
            stage = SimpleNamespace(architecture=architecture, shape=SimpleNamespace(first_layer=1), groups=groups)
            packed.append(parameter_signs(stage, parameter, 3))
        for name, whole in zip(packing.sources, packing.whole(packed), strict=True):
            assert torch.equal(whole, naive(3, name, shapes[name])), (parameter, name)
        if packing.vocab_size is not None:
            is_head = "head" in parameter and not tied
            assert packing.sources == ("lm_head.weight" if is_head else "model.embed_tokens.weight",)
            padded = torch.cat(packed)
            assert len(padded) == padded_vocabulary(131, ranks) and not padded[131:].any()
