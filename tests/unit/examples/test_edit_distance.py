"""The example of a reward term against Levenshtein's recursion, token by token."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch


def naive(first, second, substitution):
    """The edit distance of two sequences by its recursive definition."""

    @cache
    def distance(i, j):
        if i == 0 or j == 0:
            return float(i + j)
        replaced = distance(i - 1, j - 1) + substitution * (first[i - 1] != second[j - 1])
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, replaced)

    return distance(len(first), len(second))


@pytest.mark.parametrize("substitution", [1.0, 0.5, 2.0])
def test_equals_the_recursive_definition(entry_of_example, substitution):
    kind = entry_of_example("edit_distance")
    term = kind(kind.Options(substitution=substitution))
    draws = torch.Generator().manual_seed(3)
    rollouts = torch.randint(0, 3, (2, 4, 3, 5), generator=draws)
    targets = torch.randint(0, 3, (2, 3, 5), generator=draws)
    rollouts[0, 0, 0] = targets[0, 0]
    values = term.values(SimpleNamespace(rollout_tokens=rollouts, target_tokens=targets))
    assert values.dtype == torch.float64 and values.shape == (2, 4, 3)
    assert values[0, 0, 0] == 0
    for row, sample, block in torch.cartesian_prod(*map(torch.arange, values.shape)).tolist():
        expected = naive(rollouts[row, sample, block].tolist(), targets[row, block].tolist(), substitution)
        assert values[row, sample, block].item() == pytest.approx(-expected / 5, abs=1e-12)
