"""The example of a feature map: one layer, one row of it."""

import torch


def test_reads_the_last_token_of_the_deepest_layer(entry_of_example):
    feature_map = entry_of_example("one_layer")()
    assert feature_map.layers((0.25, 0.5, 0.75)) == (0.75,)
    assert list(feature_map.positions(8)) == [7]
    rows = torch.rand(2, 3, 5, 1, 4, dtype=torch.float64)
    assert torch.equal(feature_map.pool(rows), rows[:, :, :, 0])
