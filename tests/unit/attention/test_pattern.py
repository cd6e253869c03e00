import pytest
import torch
from hypothesis import example, given

from ebft_mega.attention.pattern import AttentionPattern
from tests.unit.attention.attention_passes import forest_of, patterns

CPU = torch.device("cpu")


def prefix_is_stem(level, rollout):
    """Whether what a rollout has drawn up to a level is what the document holds."""
    return bool((level.stems == level.of_rollout.flatten()[rollout]).any())


def sees(pattern, row, query, key):
    """The rule in words, for a query and a key of a row: ("document", position) or ("node", level, number)."""
    if query[0] == "document":
        if key[0] == "node":
            return False
        anchor, end = query[1] + 1, query[1] + 1
    else:
        asks = pattern.levels[query[1]]
        rollout = asks.first[asks.nodes[query[2]]].item()
        if key[0] == "node":
            level = pattern.levels[key[1]]
            return key[1] <= query[1] and level.nodes[key[2]] == level.of_rollout.flatten()[rollout]
        anchor = pattern.anchors[rollout // asks.num_samples % len(pattern.anchors)]
        end = anchor + sum(prefix_is_stem(level, rollout) for level in pattern.levels[: query[1]])
    first = max(start for start in pattern.starts_of(row) if start < anchor)
    return first <= key[1] < end


def nodes_of_row(pattern, row, first_level):
    """("node", level, number) of the row's nodes, level by level."""
    blocks = len(pattern.anchors)
    return [
        ("node", t, number)
        for t in range(first_level, len(pattern.levels))
        for number in range(len(pattern.levels[t]))
        if pattern.levels[t].node_anchors[number] // blocks == row
    ]


@given(patterns())
@example(AttentionPattern(1, (3,), (), 3, forest_of(1, 1, 1, 1).levels, 1))  # one anchor, one sample, one level
def test_masks_and_counts_follow_the_rule(pattern):
    pairs = dense = 0
    for row in range(pattern.num_rows):
        queries = [("document", position) for position in pattern.document_queries]
        queries += nodes_of_row(pattern, row, len(pattern.levels) - pattern.asking)
        keys = [("document", position) for position in range(pattern.document_keys)]
        keys += nodes_of_row(pattern, row, 0)
        expected = [[sees(pattern, row, query, key) for key in keys] for query in queries]
        expected = torch.tensor(expected, dtype=torch.bool).view(len(queries), len(keys))
        assert torch.equal(pattern.mask(row, CPU), expected)
        pairs, dense = pairs + expected.sum(), dense + expected.numel()
    assert (pattern.num_pairs, pattern.dense_pairs) == (pairs, dense)


@given(patterns())
def test_every_node_is_of_one_row(pattern):
    for asking, count in ((False, pattern.own_keys), (True, pattern.own_queries)):
        found = [pattern.nodes_of(row, asking) for row in range(pattern.num_rows)]
        assert all((nodes.diff() > 0).all() for nodes in found)
        assert torch.equal(torch.cat(found).sort().values, torch.arange(count))
    per_row = torch.tensor(pattern.nodes_per_anchor).view(pattern.num_rows, -1)
    assert per_row.sum() == pattern.own_queries
    leaves_late = any((level.branch > 0).any() for level in pattern.levels)
    if pattern.rows_are_alike:
        assert (per_row == per_row[0]).all() and not leaves_late
    else:
        assert (per_row != per_row[0]).any() or pattern.longest_branch
    assert all((level.branch <= pattern.longest_branch).all() for level in pattern.levels)


def test_counts_of_the_production_size():
    """P = 1024, c = s = G = 8, n = 4: 127 blocks, the counts of a whole feature pass of two rows worked out by hand."""
    anchors = tuple(range(8, 1017, 8))
    separate = AttentionPattern(2, anchors, range(1024), 1024, forest_of(2, 127, 4, 8, merges=False).levels, 8)
    document, prefixes, own = 1024 * 1025 // 2, 8 * 8 * 127 * 128 // 2, 127 * 36
    assert separate.own_queries == separate.own_keys == 2 * 4 * 1016
    assert separate.num_pairs == 2 * (document + 4 * prefixes + 4 * own) == 2 * 2_623_856
    equal = AttentionPattern(2, anchors, range(1024), 1024, forest_of(2, 127, 4, 8, vocabularies=(1,)).levels, 8)
    assert equal.own_queries == equal.own_keys == 2 * 1016
    assert equal.num_pairs == 2 * (document + prefixes + own)


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"anchors": (4, 4)}, "anchors must increase"),
        ({"anchors": (0, 4)}, "anchors must increase from at least 1"),
        ({"document_queries": (3, 2)}, "document queries must increase"),
        ({"document_queries": range(5, 2, -1)}, "document queries must increase"),
        ({"document_queries": (-1, 2)}, "document queries must increase from at least 0"),
        ({"document_keys": 7}, "7 document keys, but the queries see 8"),
        ({"document_queries": (11,)}, "10 document keys, but the queries see 12"),
        ({"asking": 4}, "4 levels of nodes that ask, of 3"),
        ({"asking": -1}, "-1 levels of nodes that ask"),
        ({"num_rows": 2}, "nodes of other anchors than 2 rows of 2"),
        ({"anchors": (4,)}, "nodes of other anchors than 1 rows of 1"),
        ({"document_starts": ((0, 3), (1, 2))}, "document starts must increase from 0"),
        ({"document_starts": ((0, 3, 3),)}, "document starts must increase from 0"),
        ({"document_starts": ((),)}, "document starts must increase from 0"),
    ],
)
def test_impossible_patterns_are_refused(change, problem):
    possible = {
        "num_rows": 1,
        "anchors": (4, 8),
        "document_queries": (0, 1),
        "document_keys": 10,
        "levels": forest_of(1, 2, 2, 3).levels,
        "asking": 1,
    }
    AttentionPattern(**possible)
    with pytest.raises(ValueError, match=problem):
        AttentionPattern(**(possible | change))


def test_a_pattern_is_a_cache_key_and_only_those_without_merging_repeat():
    def pattern(asking=1, **forest):
        return AttentionPattern(2, (4, 8), range(8), 8, forest_of(2, 2, 2, 3, **forest).levels, asking)

    first, second = (pattern(merges=False, seed=step) for step in range(2))
    assert first == second and hash(first) == hash(second) and first.is_shared
    assert first != pattern(asking=2, merges=False)
    merged, other = (pattern(seed=0) for _ in range(2))
    assert merged != other, "of equal tokens, but in general nobody compares them"
    assert not merged.is_shared
    assert not AttentionPattern(2, (4, 8), range(8), 8, document_starts=((0,), (0,))).is_shared
    assert AttentionPattern(2, (4, 8), range(8), 8).is_shared
