"""Mask and positions against nested loops, and the model's attention against the dense mask."""

import pytest
import torch

from ebft_mega.attention.two_part import TwoPartAttention
from ebft_mega.block_plan import BlockPlan
from ebft_mega.forest import Forest
from ebft_mega.model.strided_attention import StridedCoreAttention, StridedLayout
from ebft_mega.rollout.packed_order import packed_sequence
from tests.unit.rollout.dense_mask import packed_positions, strided_mask

PLANS = {
    "stride<G": BlockPlan(14, 2, 4, 4, 3),
    "stride=G": BlockPlan(16, 4, 4, 4, 2),
    "stride>G": BlockPlan(17, 5, 4, 3, 2),
    "one-block": BlockPlan(8, 4, 4, 4, 3),
    "one-token": BlockPlan(6, 1, 2, 1, 2),
    "n=1": BlockPlan(12, 2, 4, 2, 1),
}
plans = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())


def packed_coordinates(plan: BlockPlan, num_samples: int, tokens_per_block: int) -> list[tuple]:
    """What stands at each packed index: ("row", i) or ("generated", block, sample, token)."""
    coordinates: list[tuple] = [("row", i) for i in range(plan.sequence_length)]
    for token in range(tokens_per_block):
        for block in range(plan.num_blocks):
            for sample in range(num_samples):
                coordinates.append(("generated", block, sample, token))
    return coordinates


def may_attend(plan: BlockPlan, query: tuple, key: tuple) -> bool:
    """The rule of the strided mask for two packed positions, case by case."""
    if key[0] == "row":
        if query[0] == "row":
            return key[1] <= query[1]
        return key[1] < plan.anchors[query[1]]
    if query[0] == "row":
        return False
    return query[1] == key[1] and query[2] == key[2] and key[3] <= query[3]


@plans
@pytest.mark.parametrize("shorter", [0, 1], ids=["all-tokens", "one-token-less"])
def test_mask_equals_nested_loops(plan, shorter):
    tokens_per_block = plan.generate_length - shorter
    coordinates = packed_coordinates(plan, plan.num_samples, tokens_per_block)
    expected = torch.tensor([[may_attend(plan, query, key) for key in coordinates] for query in coordinates])
    assert torch.equal(strided_mask(plan, tokens_per_block=tokens_per_block), expected)


def test_mask_with_another_number_of_samples():
    plan = PLANS["stride=G"]
    coordinates = packed_coordinates(plan, 5, plan.generate_length)
    expected = torch.tensor([[may_attend(plan, query, key) for key in coordinates] for query in coordinates])
    assert torch.equal(strided_mask(plan, num_samples=5), expected)


def test_production_geometry_opens_a_quarter_of_the_mask():
    """The share that the authors' mask has open at its production size, with one sample."""
    mask = strided_mask(BlockPlan(1024, 8, 8, 8, 1))
    assert mask.shape == (2040, 2040)
    assert mask.double().mean().item() == pytest.approx(0.252, abs=5e-4)


@plans
def test_positions_equal_nested_loops(plan):
    for tokens_per_block in range(plan.generate_length + 1):
        expected = [
            where[1] if where[0] == "row" else plan.anchors[where[1]] + where[3]
            for where in packed_coordinates(plan, plan.num_samples, tokens_per_block)
        ]
        assert packed_positions(plan, tokens_per_block).tolist() == expected
    assert packed_positions(plan).tolist() == expected


@pytest.mark.parametrize("merges", [True, False])
@plans
def test_a_pass_lays_out_tokens_and_positions_like_the_reference(plan, merges):
    """Each rollout token carries its own coordinates as its id, so that misplacing one shows."""
    shape = (1, plan.num_samples, plan.num_blocks, plan.generate_length)
    rollouts = torch.arange(1000, 1000 + torch.Size(shape).numel()).view(shape)
    row = torch.arange(plan.sequence_length)[None]
    tokens, positions = packed_sequence(row, Forest.of(rollouts, merges), plan)
    expected = [
        where[1] if where[0] == "row" else rollouts[0, where[2], where[1], where[3]].item()
        for where in packed_coordinates(plan, plan.num_samples, plan.generate_length)
    ]
    assert tokens[0].tolist() == expected
    assert torch.equal(positions, packed_positions(plan))


@plans
def test_model_attention_equals_dense_attention_under_the_mask(plan):
    generator = torch.Generator().manual_seed(0)
    mask = strided_mask(plan)
    heads, head_dim = 2, 4
    query, key, value = (
        torch.randn(len(mask), 1, heads, head_dim, dtype=torch.float64, generator=generator) for _ in range(3)
    )
    layout = StridedLayout.of(
        plan,
        TwoPartAttention(),
        num_rows=1,
        document_length=plan.sequence_length,
        forest=Forest.of(torch.zeros(1, plan.num_samples, plan.num_blocks, plan.generate_length), merges=False),
    )
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key) / head_dim**0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    expected = torch.einsum("bhqk,kbhd->qbhd", weights, value).flatten(2)
    out = StridedCoreAttention(0)(query, key, value, layout)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
