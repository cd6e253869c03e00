"""flex_attention runs forward on a CPU; its gradients are tested where there is a GPU (`test_routes.py`).

What surrounds it is tested with gradients here: a masked softmax of the same arguments takes the kernel's place.
"""

import math
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ebft_mega.attention import flex
from ebft_mega.attention.flex import NODE_SIZES, TILE, FlexAttention, num_compilations
from ebft_mega.attention.pattern import AttentionPattern
from ebft_mega.block_plan import BlockPlan
from tests.unit.attention.attention_passes import (
    assert_same,
    forest_of,
    held_by,
    naive_attend,
    patterns,
    random_tensors,
    values_and_gradients,
)

CPU = torch.device("cpu")
CAPACITY = 5
# Tiles that are needed whole, in two rows of which one has more nodes.
STARTS = ((0,), (0, 1, 130, 256, 399))
VARIED = (1000, 1000, 1000, 2, 2, 2)
UNEQUAL = AttentionPattern(2, (5, 140, 300), range(400), 400, forest_of(2, 3, 20, 3, vocabularies=VARIED).levels, 3)
STEMS = forest_of(2, 3, 20, 3, vocabularies=VARIED, held=held_by((5, 140, 300), 3, 400, STARTS)).levels
UNEQUAL_MASKED = AttentionPattern(2, (5, 140, 300), range(400), 400, STEMS, 3, STARTS)


def padded_mask(block_mask, row):
    """Who sees whom over a row's padded positions, as the kernel takes it: whole tiles, then pairs within others."""
    rows, columns = block_mask.seq_lengths
    allowed = torch.zeros(rows // TILE, TILE, columns // TILE, TILE, dtype=torch.bool)
    pairs = block_mask.mask_mod(torch.tensor(row), None, torch.arange(rows)[:, None], torch.arange(columns)[None, :])
    pairs = pairs.view(allowed.shape)
    lists = (
        (block_mask.kv_num_blocks, block_mask.kv_indices, False),
        (block_mask.full_kv_num_blocks, block_mask.full_kv_indices, True),
    )
    for counts, indices, whole in lists:
        for tile, count in enumerate(counts[row, 0].tolist()):
            for column in indices[row, 0, tile, :count].tolist():
                assert not allowed[tile, :, column].any(), "a tile is listed twice"
                allowed[tile, :, column] = True if whole else pairs[tile, :, column]
    return allowed.view(rows, columns)


def written_out(query, key, value, *, block_mask, enable_gqa):
    """A masked softmax in the place of the kernel; queries that see nothing get zeros."""
    assert enable_gqa
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    mask = torch.stack([padded_mask(block_mask, row) for row in range(len(query))])[:, None]
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    return (scores.masked_fill(~mask, -1e300).softmax(-1) * mask) @ value


@given(patterns())
@example(UNEQUAL)
@example(UNEQUAL_MASKED)
def test_tiles_and_pairs_are_the_pattern_and_filler_sees_nothing(pattern):
    rooms = flex._make_rooms(pattern, CAPACITY, CPU)
    masks = [padded_mask(rooms.block_mask, row) for row in range(pattern.num_rows)]
    for row, mask in enumerate(masks):
        own_queries, own_keys = (room.places[room.rows == row] for room in (rooms.queries, rooms.keys))
        queries = torch.cat((torch.arange(len(pattern.document_queries)), own_queries))
        keys = torch.cat((torch.arange(pattern.document_keys), own_keys))
        assert torch.equal(mask[queries][:, keys], pattern.mask(row, CPU))
    assert sum(mask.sum() for mask in masks) == pattern.num_pairs, "filler sees or is seen"
    assert masks[0].shape[0] % TILE == masks[0].shape[1] % TILE == 0


@given(pattern=patterns(), heads_and_groups=st.sampled_from([(4, 4), (4, 2), (4, 1)]), seed=st.integers(0, 99))
@example(UNEQUAL_MASKED, (4, 2), 0)
@settings(max_examples=40)
def test_values_and_gradients_around_the_kernel_are_those_of_the_masked_softmax(pattern, heads_and_groups, seed):
    heads, groups = heads_and_groups
    tensors = random_tensors(pattern, heads=heads, groups=groups, seed=seed)
    with mock.patch.object(flex, "_compiled_kernel", lambda: written_out):
        found = values_and_gradients(FlexAttention(CAPACITY).attend, pattern, tensors)
    assert_same(found, values_and_gradients(naive_attend, pattern, tensors), 1e-10)


def test_rows_do_not_touch_each_other():
    """Filler is zero, not another row's numbers: times a weight of zero, those that are not finite would be seen."""
    tensors = random_tensors(UNEQUAL, requires_grad=False)
    damaged = UNEQUAL.nodes_of(0)
    for tensor in tensors[-2:]:
        tensor[:, damaged] = math.nan
    with mock.patch.object(flex, "_compiled_kernel", lambda: written_out):
        on_document, on_nodes = FlexAttention(CAPACITY).attend(UNEQUAL, *tensors)
    assert on_nodes[:, damaged].isnan().all()
    assert on_nodes[:, UNEQUAL.nodes_of(1)].isfinite().all() and on_document[1].isfinite().all()


def passes_of_a_run(plan, forest, starts=None):
    """By kind: document, every token, the packed policy pass, the feature pass and its last layer."""
    anchors, length, generated, end = plan.anchors, plan.sequence_length, plan.generate_length, plan.anchors[-1]
    pooled, levels = tuple(anchor + generated - 1 for anchor in anchors), forest.levels
    rows = forest.num_rows
    return {
        "document": [AttentionPattern(rows, anchors, range(end), end, document_starts=starts)],
        "decode": [AttentionPattern(rows, anchors, (), end, levels[:t], 1, starts) for t in range(1, generated)],
        "packed": [AttentionPattern(rows, anchors, range(end), end, levels[:-1], generated - 1, starts)],
        "features": [AttentionPattern(rows, anchors, range(length), length, levels, generated, starts)],
        "last features": [AttentionPattern(rows, anchors, pooled, length, levels, 1, starts)],
    }


def random_forest(plan, step, starts=None, merges=True):
    """Two rows, from one node an anchor to all different and in between; from step 4 on at random, some in documents.

    Args:
        starts: of masked documents.
    """
    generator = torch.Generator().manual_seed(step)
    mixed = [(1,), (1, 1, 1, 1000), (1, 1000), (1000,)]
    vocabularies, held = torch.tensor([1, 2, 3, 1000])[torch.randint(4, (7,), generator=generator)].tolist(), None
    if step < len(mixed):
        vocabularies = mixed[step]
    else:
        held = held_by(plan.anchors, plan.generate_length, plan.anchors[-1], starts or ((0,), (0,)))
    return forest_of(2, plan.num_blocks, plan.num_samples, plan.generate_length, merges, vocabularies, step, held)


def shape_of(pattern, capacity):
    queries, keys = flex.room_of(pattern, capacity, CPU)
    return queries.length, keys.length


def test_passes_have_few_sizes_whatever_the_rollouts():
    plan = BlockPlan(sequence_length=263, stride=2, context_length=8, generate_length=3, num_samples=4)  # 127 blocks
    found = {}
    for step in range(20):
        for kind, asked in passes_of_a_run(plan, random_forest(plan, step)).items():
            found.setdefault(kind, set()).update(shape_of(pattern, 3) for pattern in asked)
    counts = {kind: len(shapes) for kind, shapes in found.items()}
    assert counts.pop("document") == 1
    assert counts == dict.fromkeys(counts, NODE_SIZES)
    assert flex._SHAPES >= 4 * sum(map(len, found.values())), "with and without gradients, training and evaluation"

    separate = random_forest(plan, 3, merges=False)
    for kind, asked in passes_of_a_run(plan, separate).items():
        sizes = {shape_of(pattern, 3) for pattern in asked}
        assert sizes == {max(found[kind])}, "without merging there is one size, the largest"


@pytest.mark.parametrize("most, room", [(0, 0), (1, 32), (32, 32), (33, 64), (64, 64), (65, 96), (97, 126), (126, 126)])
def test_rooms_are_quarters_of_what_there_can_be(most, room):
    pattern = AttentionPattern(1, (3, 6, 9), (), 9, forest_of(1, 3, 14, 5).levels, 3)  # 3 * 14 * 3 = 126
    assert flex.query_room(pattern, most) == room


@pytest.mark.slow
def test_a_run_compiles_once_per_shape_and_never_more_whatever_its_rollouts():
    """Forests differ in every step, and masked documents start elsewhere in every other one."""
    plan = BlockPlan(sequence_length=196, stride=8, context_length=8, generate_length=4, num_samples=7)
    route = FlexAttention(own_capacity=plan.generate_length)
    before, after_step, shapes = num_compilations(), [], set()
    for step in range(9):
        starts = ((0, 50 + 20 * step), tuple(range(0, 196, 30 + step))) if step % 2 else None
        asked = passes_of_a_run(plan, random_forest(plan, step, starts), starts)
        del asked["features"]  # as the packed pass
        for pattern in sum(asked.values(), []):
            tensors = random_tensors(pattern, head_dim=16, dtype=torch.float32, seed=step, requires_grad=False)
            with torch.no_grad():
                found = dict(enumerate(route.attend(pattern, *tensors)))
            assert_same(found, dict(enumerate(naive_attend(pattern, *tensors))), 1e-5)
            shapes.add(shape_of(pattern, plan.generate_length))
        after_step.append(num_compilations() - before)
    assert after_step[3] == after_step[-1] == len(shapes)
    # Document; one or two tiles of 168 nodes at most, of a token and of the last layer alike; the packed pass's sizes.
    assert len(shapes) == 1 + 2 + NODE_SIZES <= 1 + 3 * NODE_SIZES


def test_more_levels_than_the_capacity_are_refused():
    pattern = AttentionPattern(1, (4,), (), 4, forest_of(1, 1, 1, 3).levels, 1)
    with pytest.raises(ValueError, match="3 levels do not fit into a capacity of 2"):
        FlexAttention(own_capacity=2).attend(pattern, *random_tensors(pattern))
