"""Variance within and between rows, and the squared mean, against synthetic data of known variances."""

import numpy as np
import pytest

from ebft_mega.apps.noise.variance_parts import Weights, squared_mean, variance_parts

MEAN, BETWEEN, WITHIN = 1.5, 0.5, 2.0  # of the mean gradient's squared norm, and of the two covariances' traces


def synthetic(generator, rows=6, replicates=3, directions=8, between=BETWEEN, within=WITHIN, mean=MEAN):
    """Projections [X, R, D] of gradients with these parts."""
    shape = (rows, replicates, directions)
    found = generator.normal(size=shape) * within**0.5
    found = found + generator.normal(size=(rows, 1, directions)) * between**0.5
    return found + mean**0.5 * np.where(np.arange(directions) % 2, 1.0, -1.0)


def test_all_parts_are_unbiased():
    generator = np.random.default_rng(0)
    found = [variance_parts(synthetic(generator)) for _ in range(4000)]
    for name, expected in (("within", WITHIN), ("between", BETWEEN), ("signal", MEAN), ("total", WITHIN + BETWEEN)):
        values = np.array([getattr(parts, name)[0] for parts in found])
        error = values.std() / len(values) ** 0.5
        assert abs(values.mean() - expected) < 4 * error, (name, values.mean(), expected, error)
        assert error < 0.02 * (WITHIN + BETWEEN), "a test that can fail"


def test_the_sum_is_the_variance_of_row_means():
    projections = synthetic(np.random.default_rng(1), replicates=2)
    parts = variance_parts(projections)
    of_means = projections.mean(axis=1).var(axis=0, ddof=1).mean()
    assert parts.between[0] + parts.within[0] / 2 == pytest.approx(of_means, rel=1e-12)
    assert parts.within[0] == pytest.approx(((projections[:, 0] - projections[:, 1]) ** 2).mean() / 2, rel=1e-12)


def test_resamples_are_unbiased_for_the_sample_though_they_have_rows_twice():
    means = np.random.default_rng(2).normal(size=(5, 1)) + 1
    weights = Weights.resampled(5, 1, 40_000, seed=3)
    drawn = squared_mean(means, weights)
    drawn = drawn[np.isfinite(drawn)]
    sample = squared_mean(means, Weights.equal(5, 1))[0]
    assert abs(drawn.mean() - sample) < 5 * drawn.std() / len(drawn) ** 0.5
    naive = ((weights.rows @ means / 5) ** 2).mean()
    assert abs(naive - sample) > 10 * drawn.std() / len(drawn) ** 0.5, "the square of a resampled mean is too large"


def test_weights_are_rows_written_as_often():
    projections = synthetic(np.random.default_rng(4))
    weights = Weights(np.array([[2.0, 0, 1, 1, 1, 1]]), np.array([[3.0, 0, 1, 0, 0, 0, 0, 0]]))
    found = variance_parts(projections, weights)
    again = projections[[0, 0, 2, 3, 4, 5]][:, :, [0, 0, 0, 2]]
    assert found.within[0] == pytest.approx(again.var(axis=1, ddof=1).mean(), rel=1e-12)


def test_critical_batch_and_share():
    parts = variance_parts(synthetic(np.random.default_rng(5), rows=400, replicates=8, directions=64))
    assert parts.critical_batch_rows[0] == pytest.approx((WITHIN + BETWEEN) / MEAN, rel=0.1)
    assert parts.share_between[0] == pytest.approx(BETWEEN / (WITHIN + BETWEEN), abs=0.05)
    assert parts.critical_batch_rows[0] == parts.total[0] / parts.signal[0]


def test_without_a_signal_no_batch_is_large_enough():
    flat = np.array([[[1.0], [1.1]], [[-1.0], [-1.1]]])
    assert variance_parts(flat).signal[0] < 0
    assert variance_parts(flat).critical_batch_rows[0] == np.inf


@pytest.mark.parametrize("shape", [(1, 4, 2), (4, 1, 2), (4, 4, 0)])
def test_too_few_are_refused(shape):
    with pytest.raises(ValueError, match="needed"):
        variance_parts(np.zeros(shape))


def test_what_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="finite"):
        variance_parts(np.full((3, 2, 2), np.nan))
