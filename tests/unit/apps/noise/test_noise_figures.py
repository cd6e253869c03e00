"""Ratios with bootstrap intervals, and the test of equal means, against synthetic data."""

import numpy as np
import pytest

from ebft_mega.apps.noise.noise_figures import NoiseBootstrap, chi2_per_df, interval

ROWS, REPLICATES, DIRECTIONS = 24, 3, 16


def pair(generator, ratio=0.25, bias=0.0, rows=ROWS):
    """Two estimators on the same rows: the second has `ratio` of the first's noise, and a bias of this size."""
    shape = (rows, REPLICATES, DIRECTIONS)
    # Rows differ in their noise, and in how much of it an estimator takes away: that is what intervals come from.
    scales = np.sqrt(generator.gamma(1.5, 1 / 1.5, size=(2, rows, 1, 1)) * np.array([1, ratio])[:, None, None, None])
    of_rows = 1 + generator.normal(size=(rows, 1, DIRECTIONS))
    return of_rows + bias * np.arange(2)[:, None, None, None] + scales * generator.normal(size=(2, *shape))


def within(parts):
    return parts.within


def test_intervals_of_a_ratio_hold_it_as_often_as_they_say():
    generator = np.random.default_rng(0)
    trials = 150
    inside = 0
    for trial in range(trials):
        figure = NoiseBootstrap(pair(generator), trial, num_resamples=300).ratio(within, 1, 0)
        inside += figure.low <= 0.25 <= figure.high
    assert 0.85 * trials <= inside <= 0.99 * trials, inside


def test_an_estimator_over_itself_is_one_in_every_resample():
    bootstrap = NoiseBootstrap(pair(np.random.default_rng(1)), num_resamples=50)
    figure = bootstrap.ratio(within, 1, 1, factor=2.0)
    assert (figure.value, figure.low, figure.high) == pytest.approx((2.0, 2.0, 2.0))


def test_directions_are_drawn_too():
    """One row pattern, directions of very different size: all that an interval can come from is their drawing."""
    pattern = np.array([1.0, -1.0])
    projections = np.tile(pattern[None, None, :, None], (1, 6, 1, 1)) * np.array([1.0, 3.0, 10.0, 30.0])
    figure = NoiseBootstrap(projections, num_resamples=500).figure(within, 0)
    assert figure.low < 0.5 * figure.value and figure.high > 1.5 * figure.value


def test_equal_means_agree_and_a_bias_is_seen():
    generator = np.random.default_rng(2)
    agreed = [NoiseBootstrap(pair(generator), num_resamples=200).mean_test(1, 0) for _ in range(40)]
    assert sum(test.agrees for test in agreed) >= 35
    assert np.mean([test.chi2_per_df for test in agreed]) == pytest.approx(1.0, abs=0.15)
    biased = NoiseBootstrap(pair(generator, bias=0.5), num_resamples=200).mean_test(1, 0)
    assert not biased.agrees and biased.p_value < 0.01 and biased.chi2_per_df > 3
    assert biased.squared_difference.low < 0.25 < biased.squared_difference.high


def test_chi2_of_normal_differences_is_one_with_few_rows_too():
    generator = np.random.default_rng(3)
    values = [chi2_per_df(generator.normal(size=(6, 50))) for _ in range(400)]
    assert np.mean(values) == pytest.approx(1.0, abs=4 * np.std(values) / 20)
    assert chi2_per_df(np.zeros((6, 3))) == 1.0


def test_a_resample_without_a_signal_reaches_to_infinity():
    figure = interval(3.0, np.array([1.0, 2.0, np.nan, np.inf]))
    assert (figure.low, figure.high) == (1.0, np.inf)


def test_bounds_are_wider_where_directions_are_alike():
    """Equal directions are one: its squared t value lies beyond 4 in a twentieth of all cases."""
    generator = np.random.default_rng(4)
    one = generator.normal(size=(2, ROWS, REPLICATES, 1))
    alike = NoiseBootstrap(np.tile(one, DIRECTIONS), num_resamples=300).mean_test(1, 0)
    others = NoiseBootstrap(generator.normal(size=(2, ROWS, REPLICATES, DIRECTIONS)), num_resamples=300)
    assert others.mean_test(1, 0).high < 2.5 < 3.5 < alike.high
