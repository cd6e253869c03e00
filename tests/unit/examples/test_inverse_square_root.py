"""The example of a schedule at its closed form."""

import pytest


@pytest.mark.parametrize("halving", [0.1, 1.0])
def test_half_is_left_at_the_halving(entry_of_example, halving):
    kind = entry_of_example("inverse_square_root")
    schedule = kind(kind.Options(halving=halving))
    assert schedule.factor(0.0) == 1.0
    assert schedule.factor(halving) == pytest.approx(0.5, rel=1e-15)
    factors = [schedule.factor(step / 100) for step in range(101)]
    assert factors == sorted(factors, reverse=True) and factors[-1] > 0
