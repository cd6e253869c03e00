"""Learning rates at the steps that matter, and the properties every schedule has."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebft_mega.train.learning_rate import learning_rate


def rates(scheduler: str, warmup_steps: int, total_steps: int) -> list[float]:
    return [
        learning_rate(step, peak=2.0, scheduler=scheduler, warmup_steps=warmup_steps, total_steps=total_steps)
        for step in range(total_steps)
    ]


def test_warm_up_is_linear_and_reaches_the_peak_after_its_last_step():
    assert rates("constant", 3, 6) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])


def test_linear_falls_to_zero_at_the_step_after_the_last():
    assert rates("linear", 0, 4) == pytest.approx([2.0, 1.5, 1.0, 0.5])
    assert rates("linear", 2, 6)[2:] == pytest.approx([2.0, 1.5, 1.0, 0.5])


def test_cosine_is_half_way_down_in_the_middle():
    values = rates("cosine", 0, 8)
    assert values[0] == pytest.approx(2.0) and values[4] == pytest.approx(1.0) and 0 < values[7] < 0.1


@given(
    st.sampled_from(["constant", "linear", "cosine"]),
    st.integers(min_value=0, max_value=20),
    st.integers(min_value=1, max_value=60),
)
def test_every_rate_is_positive_and_at_most_the_peak(scheduler, warmup_steps, total_steps):
    values = rates(scheduler, min(warmup_steps, total_steps), total_steps)
    assert all(0 < value <= 2.0 + 1e-12 for value in values)
