"""Where positions lie when sequence-parallel ranks hold parts of several passes."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from ebft_mega.model.hidden import HiddenShape


def shape_of(shards: int) -> HiddenShape:
    return HiddenShape(4, shards, torch.float32, torch.device("cpu"))


@given(st.integers(2, 5), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_the_order_finds_what_each_shard_has_of_every_pass(shards, pass_lengths):
    """Each rank keeps its run of every padded pass; the ranks' parts are gathered one behind the other."""
    shape = shape_of(shards)
    values = torch.arange(1, sum(pass_lengths) + 1)
    held: list[list[int]] = [[] for _ in range(shards)]
    for part in values.split(pass_lengths):
        padded = part.tolist() + [0] * (-len(part) % shards)
        for rank in range(shards):
            width = len(padded) // shards
            held[rank] += padded[rank * width : (rank + 1) * width]
    gathered = torch.tensor([value for rank in held for value in rank])
    order = shape.order(pass_lengths)
    assert torch.equal(shape.in_sequence(values, pass_lengths), gathered)
    assert torch.equal(gathered[order], values)


def test_without_shards_passes_follow_each_other():
    shape = shape_of(1)
    assert shape.order([3, 2]) is None
    assert shape.in_sequence(torch.arange(5), [3, 2]).tolist() == [0, 1, 2, 3, 4]
