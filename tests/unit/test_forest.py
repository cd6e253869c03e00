"""The forest against its definition: rollouts of one anchor share a prefix as long as they are equal."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ebft_mega.block_plan import BlockPlan
from ebft_mega.forest import Forest
from ebft_mega.rollout.packed_order import continuations, stem_rows
from ebft_mega.types import TokenBatch
from tests.distinct_prefixes import prefixes_by_level


@st.composite
def rollouts(draw) -> Tensor:
    """Tokens [B, n, K, G] of few or many ids, so that forests are anything from all-equal to all-different."""
    shape = tuple(draw(st.integers(1, most)) for most in (3, 6, 3, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    return torch.randint(0, draw(st.sampled_from((1, 2, 3, 1000))), shape, generator=generator)


def by_anchor(tokens: Tensor) -> list[list[list[int]]]:
    """[B * K][n][G]."""
    return tokens.transpose(1, 2).flatten(0, 1).tolist()


@given(rollouts())
def test_prefixes_are_what_is_distinct_of_each_anchor_in_order_of_their_first_rollout(tokens):
    forest, anchors = Forest.of(tokens, merges=True), by_anchor(tokens)
    _, samples, _, length = tokens.shape
    assert len(forest.levels) == length
    for t, level in enumerate(forest.levels):
        expected = [(a, prefix) for a, own in enumerate(anchors) for prefix in distinct(own, t + 1)]
        assert len(level) == len(expected) == sum(level.counts)
        assert level.counts == tuple(len(distinct(own, t + 1)) for own in anchors)
        assert level.starts == tuple(sum(level.counts[:a]) for a in range(len(anchors) + 1))
        assert level.prefix_counts == level.counts and level.prefix_starts == level.starts and not len(level.stems)
        assert level.nodes.tolist() == list(range(len(expected))) and level.branch.eq(0).all() and level.index == t
        assert level.anchors.tolist() == level.node_anchors.tolist() == [a for a, _ in expected]
        assert level.num_samples == samples and level.of_rollout.shape == (len(anchors), samples)
        for a, own in enumerate(anchors):
            for j, rollout in enumerate(own):
                assert expected[level.of_rollout[a, j]] == (a, rollout[: t + 1])
        firsts = [a * samples + next(j for j, own in enumerate(anchors[a]) if own[: t + 1] == p) for a, p in expected]
        assert level.first.tolist() == firsts
        assert forest.node_tokens(t).tolist() == [prefix[-1] for _, prefix in expected]
    assert forest.num_nodes == sum(map(len, forest.levels))
    assert forest.num_rollout_tokens == tokens.numel()


def distinct(rollouts_of_anchor: list[list[int]], length: int) -> list[list[int]]:
    """The first tokens of an anchor's rollouts, each once."""
    return [list(prefix) for prefix in dict.fromkeys(tuple(own[:length]) for own in rollouts_of_anchor)]


@given(rollouts(), st.booleans())
def test_paths_lead_through_the_tokens_of_every_rollout(tokens, merges):
    forest = Forest.of(tokens, merges)
    # Nodes are numbered through all levels.
    all_tokens = torch.cat([forest.node_tokens(t) for t in range(len(forest.levels))])
    for t, level in enumerate(forest.levels):
        assert level.path.shape == (len(level), t + 1)
        assert torch.equal(level.path[:, -1], torch.arange(len(level)) + forest.up_to(t).num_nodes)
        of_rollouts = level.spread(all_tokens[level.path])  # [B * K, n, t + 1]
        assert of_rollouts.tolist() == [[own[: t + 1] for own in anchor] for anchor in by_anchor(tokens)]


@given(rollouts(), st.booleans())
def test_the_rollouts_come_back_and_the_first_levels_are_the_forest_of_the_first_tokens(tokens, merges):
    forest = Forest.of(tokens, merges)
    assert torch.equal(forest.rollouts(), tokens)
    for length in range(1, tokens.shape[-1] + 1):
        first, expected = forest.up_to(length), Forest.of(tokens[..., :length], merges)
        assert torch.equal(first.rollouts(), tokens[..., :length])
        assert [level.path.tolist() for level in first.levels] == [level.path.tolist() for level in expected.levels]
    values = [level.spread(torch.arange(len(level))) for level in forest.levels]
    found = forest.by_sample(values)
    assert found.shape == tokens.shape
    for b, j, k, t in torch.cartesian_prod(*map(torch.arange, tokens.shape)).view(-1, 4).tolist():
        assert found[b, j, k, t] == forest.levels[t].of_rollout[b * tokens.shape[2] + k, j]


@given(rollouts())
def test_without_merging_every_rollout_has_nodes_of_its_own_and_levels_are_those_of_every_step(tokens):
    forest = Forest.of(tokens, merges=False)
    rows, samples, blocks, _ = tokens.shape
    for level, other in zip(forest.levels, Forest.of(tokens + 1, merges=False).levels, strict=True):
        assert level is other and level.is_separate
        assert torch.equal(level.of_rollout.flatten(), torch.arange(rows * blocks * samples))
        assert torch.equal(level.first, level.of_rollout.flatten())
        assert level.counts == (samples,) * (rows * blocks)
    assert forest.num_nodes == forest.num_rollout_tokens


def test_the_device_is_asked_once_for_each_level_and_never_where_nothing_is_merged(monkeypatch):
    asked = []
    monkeypatch.setattr("ebft_mega.forest.read_counts", lambda counts: asked.append(counts) or counts.tolist())
    alone = torch.zeros(2, 1, 3, 4, dtype=torch.int64)
    for tokens in (alone, alone.repeat(1, 2, 1, 1)):
        Forest.of(tokens, merges=False)
        assert not asked
        assert Forest.of(tokens, merges=True).num_nodes == alone.numel()
        assert len(asked) == 4  # once for each level
        asked.clear()


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (3, 5, 2, 3)])
def test_equal_rollouts_are_one_node_of_each_anchor_and_level(shape):
    tokens = torch.full(shape, 7)
    forest = Forest.of(tokens, merges=True)
    assert [level.counts for level in forest.levels] == [(1,) * (shape[0] * shape[2])] * shape[3]
    assert not any(level.is_separate for level in forest.levels)


def test_rollouts_that_part_do_not_meet_again_and_other_anchors_share_nothing():
    tokens = torch.tensor([[1, 5, 5], [2, 5, 5], [1, 5, 6]])[None, :, None].repeat(2, 1, 2, 1)
    assert [level.counts for level in Forest.of(tokens, merges=True).levels] == [(2,) * 4, (2,) * 4, (3,) * 4]


@st.composite
def continued(draw) -> tuple[Tensor, TokenBatch, BlockPlan, int]:
    """Rollouts of two ids of rows of the same, so that many stay with their document; some rows hold two documents."""
    samples, masked = draw(st.integers(1, 4)), draw(st.booleans())
    plan = draw(st.sampled_from([BlockPlan(11, 2, 3, 4, samples), BlockPlan(12, 3, 3, 3, samples)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    tokens = torch.randint(0, 2, (2, plan.sequence_length), generator=generator)
    ids = (torch.arange(plan.sequence_length) >= torch.tensor([[draw(st.integers(1, 11))], [99]])).long()
    batch = TokenBatch(tokens, ids, torch.arange(2))
    shape = 2, samples, plan.num_blocks, plan.generate_length
    most = torch.rand(shape, generator=generator) < draw(st.sampled_from((0.5, 0.9, 1.0)))
    own = tokens[:, torch.tensor(plan.anchors)[:, None] + torch.arange(plan.generate_length)]  # [B, K, G]
    rollouts = torch.where(most, own[:, None], 1 - own[:, None])
    length = draw(st.sampled_from((plan.anchors[-1], plan.sequence_length - 1)))
    return rollouts, batch.with_document_masking() if masked else batch, plan, length


@settings(max_examples=150)
@given(continued())
def test_what_the_document_holds_is_a_stem_and_all_else_a_node_that_left_it_somewhere(case):
    rollouts, batch, plan, length = case
    forest = Forest.of(rollouts, merges=True, continuations=continuations(batch, plan, length))
    expected, before = prefixes_by_level(rollouts, batch, plan, length), 0
    all_tokens = torch.cat([forest.node_tokens(t) for t in range(len(forest.levels))])
    rows_of_stems = batch.tokens[:, :length].flatten()
    for t, (level, distinct) in enumerate(zip(forest.levels, expected, strict=True)):
        prefixes = list(distinct.prefixes)
        assert [prefixes[index] for index in level.nodes] == list(distinct.nodes)
        assert [prefixes[index] for index in level.stems] == [p for p in prefixes if p not in distinct.nodes]
        anchors = range(len(level.counts))
        assert level.counts == tuple(sum(a == anchor for a, _ in distinct.nodes) for anchor in anchors)
        assert level.prefix_counts == tuple(sum(a == anchor for a, _ in prefixes) for anchor in anchors)
        assert not level.is_separate and len(level) == len(distinct.nodes) > 0
        # Documents and nodes together hold what every rollout drew.
        of_stems = rows_of_stems[stem_rows(plan, level, length)]
        assert torch.equal(level.spread(level.joined(forest.node_tokens(t), of_stems)), forest.drawn[t])
        # A node's path: as many of the document's tokens as its branch says, then nodes of its own.
        assert level.path.shape == (len(level), t + 1)
        for (anchor, own), branch, path in zip(distinct.nodes, level.branch.tolist(), level.path, strict=True):
            start = anchor % plan.num_blocks * plan.stride + plan.context_length
            assert tuple(batch.tokens[anchor // plan.num_blocks, start : start + branch].tolist()) == own[:branch]
            assert path[:branch].eq(-1).all() and path[branch:].ge(0).all()
            assert tuple(all_tokens[path[branch:]].tolist()) == own[branch:]
            stayed = [length for length in range(1, t + 2) if (anchor, own[:length]) not in expected[length - 1].nodes]
            assert branch == len(stayed)
        assert level.path[:, -1].tolist() == list(range(before, before + len(level)))
        before += len(level)
