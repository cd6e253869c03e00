"""Student's t against closed forms, printed tables and the normal distribution."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebft_mega.evaluation.student_t import incomplete_beta, t_quantile, two_sided_p

# Two-sided 95 %, 99 % and 99.9 % points of printed tables.
TABLE = {
    1: (12.706, 63.657, 636.619),
    2: (4.303, 9.925, 31.599),
    3: (3.182, 5.841, 12.924),
    4: (2.776, 4.604, 8.610),
    5: (2.571, 4.032, 6.869),
    10: (2.228, 3.169, 4.587),
    30: (2.042, 2.750, 3.646),
    120: (1.980, 2.617, 3.373),
}


@pytest.mark.parametrize("degrees", TABLE)
def test_quantiles_are_those_of_printed_tables(degrees):
    found = [t_quantile(confidence, degrees) for confidence in (0.95, 0.99, 0.999)]
    assert found == pytest.approx(TABLE[degrees], abs=6e-4)


@given(st.floats(-1e6, 1e6))
def test_one_and_two_degrees_have_closed_forms(t):
    """One degree of freedom is Cauchy's distribution; two have P(|T| > t) = 1 - t / sqrt(2 + t^2)."""
    cauchy = 2.0 / math.pi * math.atan2(1.0, abs(t))
    two = 2.0 / (2.0 + t * t + abs(t) * math.sqrt(2.0 + t * t))  # the same without cancellation
    assert two_sided_p(t, 1) == pytest.approx(cauchy, rel=1e-11)
    assert two_sided_p(t, 2) == pytest.approx(two, rel=1e-11)


@pytest.mark.parametrize("t", [0.0, 0.5, 1.96, 5.0, 20.0])
def test_many_degrees_are_the_normal_distribution(t):
    normal = math.erfc(t / math.sqrt(2))
    assert two_sided_p(t, math.inf) == normal
    assert two_sided_p(t, 1e9) == pytest.approx(normal, rel=1e-4)


@given(st.floats(0.05, 50), st.floats(0.05, 50), st.integers(1, 1023))
def test_incomplete_beta_has_its_symmetry_and_recurrence(a, b, numerator):
    x = numerator / 1024  # 1 - x is exact, too
    assert incomplete_beta(a, b, x) == pytest.approx(1 - incomplete_beta(b, a, 1 - x), abs=1e-10)
    log_term = math.lgamma(a + b) - math.lgamma(a + 1) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    assert incomplete_beta(a, b, x) - incomplete_beta(a + 1, b, x) == pytest.approx(math.exp(log_term), abs=1e-10)


@pytest.mark.parametrize(("a", "b", "x"), [(1, 1, 0.3), (3, 1, 0.7), (1, 4, 0.2), (7.5, 1, 0.99)])
def test_incomplete_beta_of_an_argument_of_one(a, b, x):
    expected = x**a if b == 1 else 1 - (1 - x) ** b
    assert incomplete_beta(a, b, x) == pytest.approx(expected, rel=1e-13)


@given(st.floats(0.01, 0.9999), st.floats(0.5, 1e4))
def test_quantile_and_probability_are_inverse(confidence, degrees):
    assert two_sided_p(t_quantile(confidence, degrees), degrees) == pytest.approx(1 - confidence, rel=1e-9)


def test_far_values_have_small_probabilities_that_are_not_zero():
    assert two_sided_p(1e3, 20) == pytest.approx(2.3e-47, rel=0.1)
    assert two_sided_p(math.inf, 3) == 0.0 == two_sided_p(1e200, 3)


@pytest.mark.parametrize(("t", "degrees"), [(math.nan, 3), (1.0, 0), (1.0, math.nan)])
def test_what_has_no_probability_is_refused(t, degrees):
    with pytest.raises(ValueError, match="degrees of freedom"):
        two_sided_p(t, degrees)


@pytest.mark.parametrize("confidence", [0.0, 1.0, math.nan])
def test_a_confidence_out_of_range_is_refused(confidence):
    with pytest.raises(ValueError, match="confidence"):
        t_quantile(confidence, 3)
