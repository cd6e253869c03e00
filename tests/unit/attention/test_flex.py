"""flex_attention runs forward on a CPU; its gradients are tested where there is a GPU (test_attention_routes)."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given

from ebft_mega.attention.flex import FlexAttention, _block_mask, num_compilations
from ebft_mega.attention.pattern import AttentionPattern
from ebft_mega.block_plan import BlockPlan
from tests.unit.attention.attention_passes import assert_same, naive_attend, patterns, random_tensors

CPU = torch.device("cpu")


def padded_mask(block_mask, row):
    """Who sees whom over a row's padded positions, as the kernel takes it: whole tiles, then pairs within others."""
    rows, columns = block_mask.seq_lengths
    allowed = torch.zeros(rows // 128, 128, columns // 128, 128, dtype=torch.bool)
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


@given(patterns())
@example(AttentionPattern((5, 140, 300), 20, range(400), 400, 3, 3))  # tiles that are needed whole
@example(AttentionPattern((5, 140, 300), 20, range(400), 400, 3, 3, ((0,), (0, 1, 130, 256, 399))))
def test_tiles_and_pairs_are_the_pattern_and_filler_sees_nothing(pattern):
    capacity = max(pattern.own_keys, 5)
    block_mask = _block_mask(pattern, capacity, CPU)
    num_document, num_queries, rollouts = len(pattern.document_queries), pattern.num_queries, pattern.num_rollouts
    document_room = -(-pattern.document_keys // 128) * 128
    num_rows = len(pattern.document_starts or ((0,),))
    expected = pattern.mask(CPU).expand(num_rows, 1, -1, -1)[:, 0]
    masks = [padded_mask(block_mask, row) for row in range(num_rows)]
    for mask, wanted in zip(masks, expected, strict=True):
        own = mask[:, document_room : document_room + rollouts * capacity].unflatten(1, (rollouts, capacity))
        own = own[:, :, : pattern.own_keys].flatten(1)
        assert torch.equal(torch.cat((mask[:num_queries, : pattern.document_keys], own[:num_queries]), dim=1), wanted)
    assert sum(mask.sum() for mask in masks) == pattern.num_pairs, "filler sees or is seen"
    assert masks[0].shape[0] % 128 == masks[0].shape[1] % 128 == 0 and num_document <= num_queries


def passes_of_a_run(plan):
    """Document, every token, the packed policy pass, the feature pass and its last layer."""
    anchors, samples, length, generated = plan.anchors, plan.num_samples, plan.sequence_length, plan.generate_length
    pooled = tuple(anchor + generated - 1 for anchor in anchors)
    return [
        AttentionPattern((), samples, range(anchors[-1]), anchors[-1], 0, 0),
        *(AttentionPattern(anchors, samples, (), anchors[-1], 1, token) for token in range(1, generated)),
        AttentionPattern(anchors, samples, range(anchors[-1]), anchors[-1], generated - 1, generated - 1),
        AttentionPattern(anchors, samples, range(length), length, generated, generated),
        AttentionPattern(anchors, samples, pooled, length, 1, generated),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("is_masked", [False, True])
def test_a_run_compiles_once_per_shape_and_never_after_its_first_step(is_masked):
    """Masked documents start elsewhere in every step."""
    plan = BlockPlan(sequence_length=200, stride=8, context_length=8, generate_length=8, num_samples=3)
    route = FlexAttention(own_capacity=plan.generate_length)
    before = num_compilations()
    after_step = []
    for step in range(3):
        for pattern in passes_of_a_run(plan):
            if is_masked:
                pattern = replace(pattern, document_starts=((0, 50 + 20 * step), tuple(range(0, 200, 30 + step))))
            tensors = random_tensors(pattern, head_dim=16, dtype=torch.float32, seed=step, requires_grad=False)
            with torch.no_grad():
                found = dict(enumerate(route.attend(pattern, *tensors)))
            assert_same(found, dict(enumerate(naive_attend(pattern, *tensors))), 1e-5)
        after_step.append(num_compilations() - before)
    assert after_step[0] <= 5 < len(passes_of_a_run(plan))  # document, one for all tokens, packed, features, last layer
    assert after_step[0] == after_step[1] == after_step[2] > 0


def test_more_keys_than_the_capacity_are_refused():
    pattern = AttentionPattern((4,), 1, (), 4, 1, 3)
    with pytest.raises(ValueError, match="3 keys per rollout do not fit into a capacity of 2"):
        FlexAttention(own_capacity=2).attend(pattern, *random_tensors(pattern))
