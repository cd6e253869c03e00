"""Holm's correction against cases by hand, its definition by rejection, and Bonferroni's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebft_mega.evaluation.multiple_comparisons import holm, simultaneous_confidence

P_VALUES = st.lists(st.floats(0, 1), max_size=8)


@pytest.mark.parametrize(
    ("given_p", "expected"),
    [
        ([], []),
        ([0.03], [0.03]),
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.02, 0.02, 0.02], [0.06, 0.06, 0.06]),
        ([0.5, 0.9, 0.001], [1.0, 1.0, 0.003]),
    ],
)
def test_cases_by_hand(given_p, expected):
    assert holm(given_p) == pytest.approx(expected)


@given(P_VALUES, st.floats(0.001, 0.2))
def test_what_is_at_most_the_level_is_what_the_procedure_rejects(p_values, level):
    """Holm's procedure: from the smallest, reject while p <= level / (number of those left)."""
    rejected = set()
    for step, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        if p_values[index] * (len(p_values) - step) > level:
            break
        rejected.add(index)
    assert {index for index, p in enumerate(holm(p_values)) if p <= level} == rejected


@given(P_VALUES)
def test_between_the_given_and_bonferroni_and_in_their_order(p_values):
    corrected = holm(p_values)
    for p, q in zip(p_values, corrected, strict=True):
        assert p <= q <= min(1.0, p * len(p_values)) + 1e-15
    by_given = [q for _, q in sorted(zip(p_values, corrected, strict=True))]
    assert by_given == sorted(corrected)


@given(P_VALUES, st.randoms())
def test_the_order_given_does_not_matter(p_values, random):
    order = list(range(len(p_values)))
    random.shuffle(order)
    shuffled = holm([p_values[index] for index in order])
    assert shuffled == pytest.approx([holm(p_values)[index] for index in order])


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_what_is_no_probability_is_refused(p):
    with pytest.raises(ValueError, match="within"):
        holm([0.5, p])


def test_simultaneous_intervals_share_the_error():
    assert simultaneous_confidence(1) == 0.95
    assert simultaneous_confidence(5) == pytest.approx(0.99)
    with pytest.raises(ValueError, match="0 intervals"):
        simultaneous_confidence(0)
