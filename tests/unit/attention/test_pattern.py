import pytest
import torch
from hypothesis import given

from ebft_mega.attention.pattern import AttentionPattern
from tests.unit.attention.attention_passes import patterns


def sees(pattern, starts, query, key):
    """The rule in words, for one query and one key of a row: ("document", position) or ("own", rollout, token)."""
    if key[0] == "own":
        return query[0] == "own" and key[1] == query[1] and key[2] <= query[2]
    anchor = query[1] + 1 if query[0] == "document" else pattern.anchors[query[1] // pattern.num_samples]
    first = max(start for start in starts if start < anchor)
    return first <= key[1] < anchor


@given(patterns())
def test_mask_and_counts_follow_the_rule(pattern):
    rollouts = range(len(pattern.anchors) * pattern.num_samples)
    first = pattern.own_keys - pattern.own_queries
    queries = [("document", position) for position in pattern.document_queries]
    queries += [("own", rollout, token) for rollout in rollouts for token in range(first, pattern.own_keys)]
    keys = [("document", position) for position in range(pattern.document_keys)]
    keys += [("own", rollout, token) for rollout in rollouts for token in range(pattern.own_keys)]
    rows = pattern.document_starts or ((0,),)
    expected = [[[sees(pattern, starts, query, key) for key in keys] for query in queries] for starts in rows]
    expected = torch.tensor(expected, dtype=torch.bool).view(len(rows), 1, len(queries), len(keys))
    if pattern.document_starts is None:
        expected = expected[0, 0]

    mask = pattern.mask(torch.device("cpu"))
    assert torch.equal(mask, expected)
    assert (pattern.num_queries, pattern.num_keys) == mask.shape[-2:]
    assert pattern.num_pairs == mask.sum()
    assert pattern.dense_pairs == mask.numel()


def test_counts_of_the_production_size():
    """P = 1024, c = s = G = 8, n = 4: 127 blocks, the counts of a whole feature pass worked out by hand."""
    anchors = tuple(range(8, 1017, 8))
    pattern = AttentionPattern(anchors, 4, range(1024), 1024, 8, 8)
    assert pattern.num_queries == 1024 + 4 * 1016
    document, prefixes, own = 1024 * 1025 // 2, 4 * 8 * 8 * 127 * 128 // 2, 508 * 36
    assert pattern.num_pairs == document + prefixes + own == 2_623_856


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
        ({"own_queries": 4}, "4 queries of a rollout with 3 keys"),
        ({"own_queries": -1}, "-1 queries of a rollout"),
        ({"document_starts": ((0, 3), (1, 2))}, "document starts must increase from 0"),
        ({"document_starts": ((0, 3, 3),)}, "document starts must increase from 0"),
        ({"document_starts": ((),)}, "document starts must increase from 0"),
    ],
)
def test_impossible_patterns_are_refused(change, problem):
    possible = {
        "anchors": (4, 8),
        "num_samples": 2,
        "document_queries": (0, 1),
        "document_keys": 10,
        "own_queries": 1,
        "own_keys": 3,
    }
    AttentionPattern(**possible)
    with pytest.raises(ValueError, match=problem):
        AttentionPattern(**(possible | change))


def test_a_pattern_is_a_cache_key():
    first, second = (AttentionPattern((4, 8), 2, range(8), 8, 1, 3) for _ in range(2))
    assert first == second and hash(first) == hash(second)
    assert first != AttentionPattern((4, 8), 2, range(8), 8, 1, 2)
