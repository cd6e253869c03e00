"""Stages of a feature network, which is cut by itself."""

import pytest

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.partition import StageShape
from tests.conftest import tiny_config


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("depth", [1, 3, 4])
def test_the_final_norm_is_where_the_model_s_last_layer_is(depth, stages):
    """Also in a pipeline that is longer than the network is deep; a network cut lower has none."""
    architecture = Architecture.from_hf(tiny_config("llama"), "test")
    assert architecture.num_hidden_layers == 4
    shapes = [StageShape.of_features(architecture, depth, stage, stages) for stage in range(stages)]
    assert sum(shape.num_layers for shape in shapes) == depth
    with_norm = [shape for shape in shapes if shape.has_final_norm]
    assert [shape.first_layer + shape.num_layers for shape in with_norm] == ([4] if depth == 4 else [])
    assert all(shape.num_layers for shape in with_norm)
