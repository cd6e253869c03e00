"""Intervals over seeds and documents: closed forms of balanced layouts, coverage, and what they reduce to."""

from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebft_mega.evaluation.bootstrap import Interval, paired_bootstrap
from ebft_mega.evaluation.crossed_interval import CrossedInterval, crossed_bootstrap, crossed_interval
from ebft_mega.evaluation.student_t import t_quantile, two_sided_p

FEW = 50  # resamples where the bootstrap is not what is tested


def layout(generator, num_seeds, groups, seed=0.0, document=0.0, both=0.0, row=0.0, error=0.0):
    """[S, R] with an effect of each kind, of the standard deviation given."""
    groups = np.asarray(groups)
    num_groups, num_rows = groups.max() + 1, len(groups)
    values = seed * generator.normal(size=(num_seeds, 1)) + document * generator.normal(size=num_groups)[groups]
    values = values + both * generator.normal(size=(num_seeds, num_groups))[:, groups]
    return values + row * generator.normal(size=num_rows) + error * generator.normal(size=(num_seeds, num_rows))


def unequal(num_groups, generator):
    return np.repeat(np.arange(num_groups), generator.integers(1, 4, size=num_groups))


def test_a_balanced_layout_has_the_mean_squares_of_the_analysis_of_variance():
    """V = (MS_seeds + MS_documents - MS_both) / (S G), with one row a document."""
    num_seeds, num_documents = 4, 30
    values = layout(np.random.default_rng(3), num_seeds, np.arange(num_documents), seed=1, document=3, error=1)
    found = crossed_interval(values, num_resamples=FEW)
    rest = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    squares = {
        "seeds": (num_documents * values.mean(1).var(ddof=1), num_seeds - 1),
        "documents": (num_seeds * values.mean(0).var(ddof=1), num_documents - 1),
        "both": ((rest**2).sum() / (num_seeds - 1) / (num_documents - 1), (num_seeds - 1) * (num_documents - 1)),
    }
    total = squares["seeds"][0] + squares["documents"][0] - squares["both"][0]
    assert total > max(squares["seeds"][0], squares["documents"][0]), "nothing is cut off here"
    assert found.standard_error == pytest.approx((total / num_seeds / num_documents) ** 0.5)
    degrees = total**2 / sum(square**2 / freedom for square, freedom in squares.values())
    assert found.degrees_of_freedom == pytest.approx(max(degrees, num_seeds - 1))
    assert found.p == pytest.approx(two_sided_p(values.mean() / found.standard_error, found.degrees_of_freedom))


def test_without_seeds_only_documents_are_drawn():
    values = np.random.default_rng(1).normal(0.2, 1.0, size=(1, 40))
    found = crossed_interval(values, num_resamples=4000)
    half = t_quantile(0.95, 39) * values.std(ddof=1) / 40**0.5
    assert astuple(found.combined) == pytest.approx((values.mean(), values.mean() - half, values.mean() + half))
    assert found.by_seeds is None and found.seed_means == (pytest.approx(values.mean()),)
    assert found.by_rows.low == pytest.approx(found.combined.low, abs=0.1 * half)


def test_where_only_seeds_differ_it_is_students_t():
    values = np.repeat(np.array([[0.1], [0.3], [0.2]]), 20, axis=1)
    found = crossed_interval(values, groups=[f"d{row // 4}" for row in range(20)], num_resamples=FEW)
    half = 4.3027 * 0.1 / 3**0.5
    assert astuple(found.by_seeds) == pytest.approx((0.2, 0.2 - half, 0.2 + half), abs=1e-4)
    assert astuple(found.combined) == pytest.approx(astuple(found.by_seeds), abs=1e-9)
    assert found.degrees_of_freedom == pytest.approx(2)
    assert (found.sign, found.by_documents.sign) == (0, 1), "documents alone would have named a direction"


def test_the_parts_are_the_bootstraps_of_the_means_over_seeds():
    generator = np.random.default_rng(5)
    groups = unequal(12, generator)
    values = layout(generator, 3, groups, seed=0.2, document=1, error=1)
    found = crossed_interval(values, groups.tolist(), num_resamples=300, seed=7)
    assert found.by_rows == paired_bootstrap(values.mean(0), 300, 7)
    assert found.by_documents == paired_bootstrap(values.mean(0), 300, 7, groups.tolist())
    assert (found.rows, found.documents) == (len(groups), 12)


CASES = {
    "documents": {"document": 1.0, "error": 0.1},
    "seeds": {"seed": 1.0, "error": 0.3},
    "both of one size": {"seed": 0.2, "document": 1.0, "error": 1.0},
    "everything": {"seed": 0.15, "document": 0.7, "both": 0.7, "row": 0.7, "error": 0.7},
}


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
@pytest.mark.parametrize("name", CASES)
def test_coverage_is_near_95_percent(name, num_seeds, monkeypatch):
    monkeypatch.setattr("ebft_mega.evaluation.crossed_interval.paired_bootstrap", lambda *_: Interval(0, 0, 0))
    generator = np.random.default_rng(11)
    covered, trials = 0, 400
    for _ in range(trials):
        groups = unequal(30, generator)
        found = crossed_interval(layout(generator, num_seeds, groups, **CASES[name]), groups.tolist())
        covered += found.combined.low <= 0 <= found.combined.high
    assert 0.92 <= covered / trials <= 0.98, covered / trials


def test_no_effects_but_noise_gives_a_wider_interval_not_a_narrower_one(monkeypatch):
    monkeypatch.setattr("ebft_mega.evaluation.crossed_interval.paired_bootstrap", lambda *_: Interval(0, 0, 0))
    generator = np.random.default_rng(12)
    found = [crossed_interval(generator.normal(size=(3, 40))).combined for _ in range(400)]
    assert sum(each.low <= 0 <= each.high for each in found) / 400 >= 0.95


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.floats(-3, 3), st.floats(0.1, 10), st.integers(0, 999))
def test_shift_and_scale_carry_over(num_seeds, shift, scale, seed):
    generator = np.random.default_rng(seed)
    groups = unequal(6, generator)
    values = layout(generator, num_seeds, groups, seed=1, document=1, error=1)
    plain = crossed_interval(values, groups.tolist(), num_resamples=FEW)
    moved = crossed_interval(shift + scale * values, groups.tolist(), num_resamples=FEW)
    assert moved.standard_error == pytest.approx(scale * plain.standard_error)
    assert moved.degrees_of_freedom == pytest.approx(plain.degrees_of_freedom)
    assert moved.combined.low == pytest.approx(shift + scale * plain.combined.low, abs=1e-6)
    order = generator.permutation(num_seeds)
    assert crossed_interval(values[order], groups.tolist(), num_resamples=FEW).combined == Interval(
        *map(pytest.approx, astuple(plain.combined))
    )


def test_another_confidence():
    found = crossed_interval(np.random.default_rng(0).normal(size=(3, 25)), num_resamples=FEW)
    assert astuple(found.at(0.95)) == pytest.approx(astuple(found.combined))
    assert found.at(0.99).high > found.combined.high


def test_the_widest_is_quoted_and_all_of_them_must_agree():
    near, far = Interval(1.0, 0.5, 1.5), Interval(1.0, -0.2, 2.2)
    common = {"standard_error": 1.0, "degrees_of_freedom": 3.0, "p": 0.1, "seed_means": (1.0,)}
    found = CrossedInterval(far, near, None, near, **common, rows=4, documents=2)
    assert (found.widest, found.sign) == (far, 0)
    assert CrossedInterval(near, None, far, near, **common, rows=4, documents=2).sign == 1


def test_equal_differences_are_certain():
    found = crossed_interval(np.full((2, 5), 0.25), num_resamples=FEW)
    assert (found.mean, found.standard_error, found.p, found.sign) == (0.25, 0.0, 0.0, 1)
    assert crossed_interval(np.zeros((2, 5)), num_resamples=FEW).p == 1.0


@pytest.mark.parametrize("values", [np.zeros(5), np.zeros((0, 5)), np.zeros((2, 1)), np.array([[1.0, np.nan]])])
def test_what_has_no_interval_is_refused(values):
    with pytest.raises(ValueError, match=r"\[seeds, rows\]|not finite"):
        crossed_interval(values)


def test_the_bootstrap_of_a_mean_is_that_of_the_mean():
    """Of means over rows it agrees with the interval by variances, where there are many seeds."""
    generator = np.random.default_rng(2)
    groups = unequal(40, generator)
    values = layout(generator, 30, groups, seed=0.5, document=1, error=0.5)
    drawn = crossed_bootstrap(
        lambda seeds, times: float(np.average(values[seeds].mean(0), weights=times)), 30, len(groups), groups.tolist()
    )
    whole = crossed_interval(values, groups.tolist(), num_resamples=FEW)
    assert drawn.mean == pytest.approx(whole.mean)
    width = whole.combined.high - whole.combined.low
    assert drawn.high - drawn.low == pytest.approx(width, rel=0.12)


def test_the_bootstrap_draws_whole_documents_and_seeds():
    seen = []

    def statistic(seeds, times):
        seen.append((tuple(seeds), tuple(times)))
        return 0.0

    crossed_bootstrap(statistic, 3, 4, ["a", "a", "b", "b"], num_resamples=40)
    assert {times for _, times in seen} == {(2, 2, 0, 0), (0, 0, 2, 2), (1, 1, 1, 1)}
    assert len({seeds for seeds, _ in seen}) > 10 and seen[-1] == ((0, 1, 2), (1, 1, 1, 1))
