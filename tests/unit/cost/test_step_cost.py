"""The counts of a step against an independent count, against masks, and against what they must be made of."""

import dataclasses
import re
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebft_mega.apps.benchmark.case import MODELS
from ebft_mega.block_plan import BlockPlan
from ebft_mega.cost.naive_cost import cost_of_naive_step
from ebft_mega.cost.rollout_nodes import DistinctShares, RolloutNodes
from ebft_mega.cost.step_cost import StepShape, cost_of_step, least_cost_of_step
from ebft_mega.cost.work import Flops, LayerWork

LARGE = MODELS["7b"].architecture
DEFAULT = BlockPlan(1024, 8, 8, 8, 4)


def shape_of(plan=DEFAULT, **changes):
    return StepShape(LARGE, LARGE, plan, **changes)


@st.composite
def plans(draw):
    stride, context = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    generated, blocks = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    length = context + generated + stride * (blocks - 1)
    return BlockPlan(length, stride, context, generated, draw(st.integers(1, 4)))


def test_the_baseline_has_the_counts_of_the_existing_trainers():
    cost = cost_of_naive_step(shape_of())
    assert (cost.generate.rows, cost.generate.head_rows) == (46_992, 46_992)
    assert (cost.features.rows, cost.features.head_rows, cost.features.layers) == (8_160, 8_160, 28)
    assert cost.policy_forward.rows == cost.policy_forward.head_rows == 8_160
    assert cost.features.pairs == 16_646_400


@pytest.mark.parametrize("reuse", ["checkpoints", "activations"])
def test_ours_has_the_counts_that_were_promised(reuse):
    cost = cost_of_step(shape_of(), reuse)
    assert (cost.generate.rows, cost.generate.head_rows) == (4_572, 3_683)
    assert (cost.features.rows, cost.features.layers, cost.features.head_rows) == (5_088, 21, 0)
    assert cost.features.pairs == 2_623_856
    assert (cost.policy_forward.rows, cost.policy_forward.head_rows) == (0, 0)


@pytest.mark.parametrize(
    ("length", "bound", "baseline", "checkpointing"), [(1024, 241.2, 1181.7, 1294.7), (4096, 1013.0, None, 5942.0)]
)
def test_flops_of_a_7b_step_are_those_of_another_count(length, bound, baseline, checkpointing):
    """Tera-FLOPs per row of an independent count of the same steps, to the digits it was given with."""
    shape = shape_of(BlockPlan(length, 8, 8, 8, 4))
    assert least_cost_of_step(shape).total / 1e12 == pytest.approx(bound, abs=0.1)
    if baseline:
        assert cost_of_naive_step(shape).total / 1e12 == pytest.approx(baseline, abs=0.15)
    assert cost_of_naive_step(shape, checkpoints_layers=True).total / 1e12 == pytest.approx(checkpointing, abs=0.5)


def test_a_7b_step_is_close_to_the_limit():
    shape = shape_of()
    bound = least_cost_of_step(shape).total
    assert cost_of_step(shape, "checkpoints").total <= 1.30 * bound
    assert cost_of_step(shape, "activations").total <= 1.05 * bound
    naive = [cost_of_naive_step(shape, checkpoints_layers=on).total / bound for on in (False, True)]
    assert naive == [pytest.approx(4.90, abs=0.005), pytest.approx(5.37, abs=0.005)]


def test_what_the_baseline_does_again():
    plain = cost_of_naive_step(shape_of())
    attention, linear = plain.policy_forward.flops.attention, plain.policy_forward.flops.linear
    assert plain.policy_backward.recomputed == Flops()
    fused = cost_of_naive_step(shape_of(), keeps_weights=False)
    assert fused.policy_backward.recomputed == Flops(attention=attention // 2)
    checkpointing = cost_of_naive_step(shape_of(), checkpoints_layers=True)
    assert checkpointing.policy_backward.recomputed == Flops(linear=linear, attention=attention)


def test_a_layer_does_what_its_parameters_say():
    """Without norms and biases, a forward multiplies each weight with each position once."""
    norms_and_biases = 2 * LARGE.hidden_size + (28 + 2 * 4) * 128
    flops = LayerWork.whole(rows=3, pairs=5).flops(LARGE)
    assert flops == Flops(linear=2 * 3 * (LARGE.layer_parameters - norms_and_biases), attention=4 * 28 * 128 * 5)


@given(plans(), st.booleans(), st.booleans())
def test_pairs_are_those_of_the_mask(plan, uses_targets, pools_all):
    """Counted one query at a time, from the definition of who sees whom."""
    tokens_read = plan.generate_length if pools_all else 1
    shape = shape_of(plan, uses_targets=uses_targets, tokens_read=tokens_read)
    document = plan.sequence_length - 1 if uses_targets else plan.anchors[-1]
    queries = [position + 1 for position in range(document)]
    queries += [anchor + t + 1 for anchor in plan.anchors for t in range(plan.generate_length - 1)] * plan.num_samples
    policy = shape.policy_layer(uses_targets)
    assert (policy.keys, policy.pairs) == (len(queries), sum(queries))

    features = [position + 1 for position in range(plan.sequence_length)]
    features += [anchor + t + 1 for anchor in plan.anchors for t in range(plan.generate_length)] * plan.num_samples
    cost = cost_of_step(shape, "off").features
    assert (cost.rows, cost.pairs) == (len(features), sum(features))
    window = range(plan.generate_length - tokens_read, plan.generate_length)
    pooled = [position + 1 for position in {anchor + t for anchor in plan.anchors for t in window}]
    pooled += [anchor + t + 1 for anchor in plan.anchors for t in window] * plan.num_samples
    assert (shape.pooled.outputs, shape.pooled.pairs) == (len(pooled), sum(pooled))


@given(plans(), st.booleans(), st.booleans())
def test_nothing_is_below_the_limit(plan, uses_targets, pools_all):
    tokens_read = plan.generate_length if pools_all else 1
    shape = shape_of(plan, uses_targets=uses_targets, tokens_read=tokens_read)
    bound = least_cost_of_step(shape)
    activations, checkpoints = (cost_of_step(shape, reuse) for reuse in ("activations", "checkpoints"))
    off = cost_of_step(shape, "off")
    assert bound.total <= activations.total < checkpoints.total
    assert activations.total <= off.total < cost_of_step(shape, "off", checkpoints_layers=True).total
    assert activations.total < cost_of_naive_step(shape).total
    # What is not done again is the same whatever is kept.
    assert activations.policy_backward.flops == checkpoints.policy_backward.flops == off.policy_backward.flops


@st.composite
def forests(draw):
    """A plan, the tokens of its rollouts, of so few tokens that many begin alike, and the row's own."""
    plan = draw(plans())
    tokens = st.tuples(*[st.integers(0, 2)] * plan.generate_length)
    blocks = st.tuples(*[st.tuples(*[tokens] * plan.num_samples)] * plan.num_blocks)
    row = draw(st.lists(st.integers(0, 3), min_size=plan.sequence_length, max_size=plan.sequence_length))
    return plan, draw(blocks), tuple(row)


def beginnings(plan, rollouts, row):
    """Of every level, of every block the different first tokens of its rollouts, and which the row has itself."""
    prefixes = [[{rollout[: t + 1] for rollout in block} for block in rollouts] for t in range(plan.generate_length)]
    stems = [
        [{row[anchor : anchor + t + 1]} & found for anchor, found in zip(plan.anchors, blocks, strict=True)]
        for t, blocks in enumerate(prefixes)
    ]
    return prefixes, stems


@given(forests(), st.booleans(), st.booleans())
def test_rows_and_pairs_of_rollouts_that_begin_alike(forest, uses_targets, pools_all):
    """Counted one different beginning at a time, from the definition of who sees whom."""
    plan, rollouts, text = forest
    tokens_read = plan.generate_length if pools_all else 1
    prefixes, stems = beginnings(plan, rollouts, text)
    levels = [[a - b for a, b in zip(*blocks, strict=True)] for blocks in zip(prefixes, stems, strict=True)]
    counts = [
        SimpleNamespace(counts=tuple(map(len, nodes)), prefix_counts=tuple(map(len, found)))
        for nodes, found in zip(levels, prefixes, strict=True)
    ]
    (nodes,) = RolloutNodes.of_forest(counts, plan.num_blocks)
    shape = shape_of(plan, uses_targets=uses_targets, tokens_read=tokens_read, nodes=nodes)

    def sees(of_levels):
        """Keys that each different beginning sees."""
        return [
            anchor + t + 1
            for t in of_levels
            for anchor, found in zip(plan.anchors, levels[t], strict=True)
            for _ in found
        ]

    fed, whole = sees(range(plan.generate_length - 1)), sees(range(plan.generate_length))
    document = plan.document_length(uses_targets)
    policy, features = shape.policy_layer(uses_targets), cost_of_step(shape, "off").features
    assert (policy.keys, policy.pairs) == (document + len(fed), document * (document + 1) // 2 + sum(fed))
    row = plan.sequence_length
    assert (features.rows, features.pairs) == (row + len(whole), row * (row + 1) // 2 + sum(whole))
    window = range(plan.generate_length - tokens_read, plan.generate_length)
    read = [anchor + t + 1 for anchor, t in {(a + t, 0) for a in plan.anchors for t in window}] + sees(window)
    assert (shape.pooled.outputs, shape.pooled.pairs) == (len(read), sum(read))
    generate = cost_of_step(shape, "off").generate
    drawn = sum(len(found) for blocks in prefixes[:-1] for found in blocks)
    assert generate.head_rows == plan.num_blocks + drawn
    last_read = {anchor - 1 for anchor in plan.anchors}
    for t, blocks in enumerate(stems[:-1]):
        last_read |= {anchor + t for anchor, found in zip(plan.anchors, blocks, strict=True) if found}
    assert nodes.document_rows(plan, shape.fed_levels) == (len(last_read), sum(p + 1 for p in last_read))

    bound, plain = least_cost_of_step(shape), least_cost_of_step(shape_of(plan, uses_targets=uses_targets))
    assert (bound.generate.rows, bound.features.rows) == (policy.keys, features.rows)
    assert bound.total <= cost_of_step(shape, "activations").total
    if not pools_all:
        assert bound.total <= plain.total
    assert bound.generate.head_rows == len(last_read) + len(fed)
    shares = nodes.shares(plan)
    assert shares.features == pytest.approx(len(whole) / plan.generated_per_row)
    if plan.generate_length == 1:
        assert (shares.policy, shares.head) == (None, None) and not fed
    else:
        most = plan.rollouts_per_row * (plan.generate_length - 1)
        assert (shares.policy, shares.head) == (pytest.approx(len(fed) / most), pytest.approx(drawn / most))
    # The same shares alike in all blocks are as many rows; only pairs are about as many.
    expected = dataclasses.replace(shape, nodes=RolloutNodes.of_shares(plan, shares))
    assert abs(expected.fed_rows - len(fed)) <= 1
    assert abs(expected.feature_rows - shape.feature_rows) <= 1
    assert abs(expected.rollout_head_rows - shape.rollout_head_rows) <= 1


@given(plans(), st.booleans())
def test_a_share_of_one_is_the_step_without_merging(plan, uses_targets):
    shares = DistinctShares(1.0, 1.0 if plan.generate_length > 1 else None)
    shape, plain = (
        shape_of(plan, uses_targets=uses_targets, nodes=nodes) for nodes in (RolloutNodes.of_shares(plan, shares), None)
    )
    for reuse in ("off", "checkpoints", "activations"):
        assert cost_of_step(shape, reuse) == cost_of_step(plain, reuse)
    assert least_cost_of_step(shape) == least_cost_of_step(plain)


def test_the_last_level_has_what_the_others_leave():
    """At G = 4 the first three levels have .5 each, so the last one needs .8 for a mean of .575."""
    plan = BlockPlan(1024, 4, 8, 4, 4)
    assert DistinctShares(0.575, 0.5).by_level(plan) == pytest.approx((0.5, 0.5, 0.5, 0.8))
    assert DistinctShares(0.7).by_level(plan) == pytest.approx((0.7,) * 4)
    assert DistinctShares(0.7).by_level(BlockPlan(1024, 1, 8, 1, 4)) == (0.7,)
    # Rounded to two digits, and the last level would be more than all.
    assert DistinctShares(0.97, 0.95).by_level(plan) == (0.95, 0.95, 0.95, 1.0)


@pytest.mark.parametrize(
    ("shares", "says"),
    [
        (DistinctShares(0.5, -0.1), "a share of the policy lies between 0 and 1, not -0.1"),
        (DistinctShares(1.2, 0.9), "a share of features lies between 0 and 1, not 1.2"),
        (DistinctShares(0.6, 0.5, 1.2), "a share of the head lies between 0 and 1, not 1.2"),
        (DistinctShares(0.5, 0.9), "of features lies between it and 0.925, not 0.5"),
        (DistinctShares(0.9, 0.4), "of features lies between it and 0.55, not 0.9"),
        (DistinctShares(0.6, 0.5, 0.4), "a share of the head is not below that of the policy, 0.5: not 0.4"),
    ],
)
def test_shares_that_no_rollouts_have(shares, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        shares.by_level(BlockPlan(1024, 4, 8, 4, 4))


def test_costs_of_rows_add_up():
    few, many = (shape_of(nodes=RolloutNodes.of_shares(DEFAULT, DistinctShares(x))) for x in (0.25, 0.75))
    both = cost_of_step(few, "checkpoints") + cost_of_step(many, "checkpoints")
    assert both.total == cost_of_step(few, "checkpoints").total + cost_of_step(many, "checkpoints").total
    assert (
        both.features.layers == 21
        and both.generate.rows
        == 2
        * cost_of_step(
            shape_of(nodes=RolloutNodes.of_shares(DEFAULT, DistinctShares(0.5))), "checkpoints"
        ).generate.rows
    )


def test_without_rollouts_there_is_one_plain_forward_and_backward():
    cost = cost_of_step(shape_of(uses_rollouts=False, uses_targets=True), "checkpoints")
    assert cost.generate.total == cost.features.total == 0
    assert cost.policy_forward.rows == cost.policy_forward.head_rows == 1023
    assert cost.policy_forward.pairs == 1023 * 1024 // 2
    linear = 2 * 1023 * (28 * LayerWork.whole(1, 0).flops(LARGE).linear // 2)
    assert cost.policy_forward.flops.linear == linear
    assert cost.policy_backward.flops == cost.policy_forward.flops.times(2)
    assert cost.policy_backward.recomputed.linear == 0


def test_targets_cost_their_head_rows_and_the_rest_of_the_row():
    plain, with_targets = (cost_of_step(shape_of(uses_targets=on), "checkpoints") for on in (False, True))
    assert with_targets.generate.rows - plain.generate.rows == 1023 - 1016
    assert with_targets.generate.head_rows == plain.generate.head_rows
    assert (with_targets.policy_forward.rows, with_targets.policy_forward.head_rows) == (0, 1023)
    assert with_targets.policy_backward.head_rows == plain.policy_backward.head_rows + 1023


def linear_work(cost):
    return sum(phase.flops.linear + phase.flops.head for phase in cost.phases.values())


@pytest.mark.parametrize("reuse", ["checkpoints", "activations", "off"])
def test_linear_work_is_linear(reuse):
    """Equal steps in the row's length or in n add equal work; the baseline's is the same but for attention."""
    by_length = [linear_work(cost_of_step(shape_of(BlockPlan(16 + 8 * k, 8, 8, 8, 4)), reuse)) for k in range(1, 200)]
    by_samples = [linear_work(cost_of_step(shape_of(BlockPlan(1024, 8, 8, 8, n)), reuse)) for n in range(1, 20)]
    for works in (by_length, by_samples):
        assert len({after - before for before, after in zip(works, works[1:], strict=False)}) == 1


def test_work_with_stride_goes_with_the_number_of_blocks():
    """Halving the stride doubles blocks and rollouts; only the document stays."""
    for stride in (4, 8, 16):
        plan = BlockPlan(1040, stride, 8, 8, 4)
        rollouts = cost_of_step(shape_of(plan), "checkpoints").generate.rows - plan.anchors[-1]
        assert rollouts == 4 * 7 * plan.num_blocks


def test_other_feature_depths_and_models():
    shape = dataclasses.replace(shape_of(), feature_layers=(0.5,))
    assert cost_of_step(shape, "off").features.layers == 14
    small = dataclasses.replace(LARGE, num_hidden_layers=4, hidden_size=64)
    cost = cost_of_step(dataclasses.replace(shape, feature_architecture=small), "off")
    assert cost.features.layers == 2
    assert cost.generate == cost_of_step(shape, "off").generate
