"""The bootstrap against closed forms, coverage and hand-made groups."""

from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebft_mega.evaluation.bootstrap import Interval, paired_bootstrap


def test_interval_has_the_normal_width():
    """For many rows the percentile interval is the mean ± 1.96 standard errors."""
    values = np.random.default_rng(1).normal(0.3, 2.0, size=400)
    interval = paired_bootstrap(values, num_resamples=20_000, seed=3)
    half_width = 1.96 * values.std() / np.sqrt(len(values))
    assert interval.mean == pytest.approx(values.mean(), abs=1e-12)
    assert interval.low == pytest.approx(values.mean() - half_width, abs=0.05 * half_width)
    assert interval.high == pytest.approx(values.mean() + half_width, abs=0.05 * half_width)


def test_coverage_is_near_95_percent():
    generator = np.random.default_rng(7)
    covered = 0
    for trial in range(300):
        interval = paired_bootstrap(generator.normal(1.0, 1.0, size=60), num_resamples=600, seed=trial)
        covered += interval.low <= 1.0 <= interval.high
    assert 0.90 <= covered / 300 <= 0.98


def test_equal_rows_in_groups_count_once():
    """Copies of one value in a group add no evidence: the interval is that of the groups' means."""
    group_means = np.random.default_rng(5).normal(size=20)
    values = np.repeat(group_means, 8)
    groups = np.repeat(np.arange(20), 8).tolist()
    by_row = paired_bootstrap(values, seed=1)
    by_group = paired_bootstrap(values, seed=1, groups=groups)
    of_means = paired_bootstrap(group_means, seed=1)
    assert astuple(by_group) == pytest.approx(astuple(of_means), abs=1e-12)
    ratio = (by_group.high - by_group.low) / (by_row.high - by_row.low)
    assert ratio == pytest.approx(np.sqrt(8), rel=0.1)


def test_mean_is_over_rows_when_groups_differ_in_size():
    interval = paired_bootstrap(np.array([1.0, 1.0, 1.0, 5.0]), groups=["a", "a", "a", "b"])
    assert interval.mean == 2.0
    assert (interval.low, interval.high) == (1.0, 5.0)


@settings(max_examples=50)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30), st.floats(-5, 5), st.integers(0, 99))
def test_shift_moves_the_interval_along(values, shift, seed):
    before = paired_bootstrap(np.array(values), num_resamples=200, seed=seed)
    after = paired_bootstrap(np.array(values) + shift, num_resamples=200, seed=seed)
    assert after.low == pytest.approx(before.low + shift, abs=1e-6)
    assert after.high == pytest.approx(before.high + shift, abs=1e-6)


def test_chunks_do_not_change_the_number_of_resamples(monkeypatch):
    values = np.arange(10.0)
    monkeypatch.setattr("ebft_mega.evaluation.bootstrap.INDICES_PER_CHUNK", 35)
    interval = paired_bootstrap(values, num_resamples=2_000, seed=0)
    assert 2.0 < interval.low < 4.5 < interval.high < 7.0


def test_sign():
    assert Interval(1.0, 0.1, 2.0).sign == 1
    assert Interval(-1.0, -2.0, -0.1).sign == -1
    assert Interval(1.0, -0.1, 2.0).sign == 0
    assert Interval(0.0, 0.0, 0.0).sign == 0


@pytest.mark.parametrize(
    "values, groups, message",
    [
        (np.array([1.0]), None, "at least two"),
        (np.array([1.0, 2.0]), ["a", "a"], "at least two"),
        (np.array([1.0, np.nan]), None, "not finite"),
        (np.array([1.0, 2.0]), ["a"], "1 groups for 2 rows"),
        (np.ones((2, 2)), None, "vector"),
    ],
)
def test_bad_input(values, groups, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(values, groups=groups)
