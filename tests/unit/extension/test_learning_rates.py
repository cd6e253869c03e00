"""Learning rates at the steps that matter, and the properties every schedule has."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebft_mega.errors import EntryError
from ebft_mega.extension.learning_rate_schedule import LearningRates, LearningRateSchedule
from ebft_mega.registry.kinds import SCHEDULES

MADE = {name: SCHEDULES.entry(name)() for name in SCHEDULES.own_names()}


def rates(scheduler: str, warmup_steps: int, total_steps: int, lowest: float = 0.0) -> list[float]:
    of_run = LearningRates(MADE[scheduler], peak=2.0, lowest=lowest, warmup_steps=warmup_steps, total_steps=total_steps)
    return [of_run.at(step) for step in range(total_steps)]


def test_warm_up_is_linear_and_reaches_the_peak_after_its_last_step():
    assert rates("constant", 3, 6) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])


def test_linear_falls_to_the_lowest_rate_at_the_step_after_the_last():
    assert rates("linear", 0, 4) == pytest.approx([2.0, 1.5, 1.0, 0.5])
    assert rates("linear", 2, 6)[2:] == pytest.approx([2.0, 1.5, 1.0, 0.5])
    assert rates("linear", 2, 6, lowest=1.0) == pytest.approx([2 / 3, 4 / 3, 2.0, 1.75, 1.5, 1.25])


def test_cosine_is_half_way_down_in_the_middle():
    values = rates("cosine", 0, 8)
    assert values[0] == 2.0 and values[4] == pytest.approx(1.0) and 0 < values[7] < 0.1
    assert rates("cosine", 0, 8, lowest=0.5)[4] == pytest.approx(1.25)


def test_the_plateau_ends_with_the_share_that_falls():
    assert rates("warmup_stable_decay", 0, 10) == pytest.approx([2.0] * 9 + [1.0])
    assert rates("warmup_stable_decay", 5, 15)[5:] == pytest.approx([2.0] * 9 + [1.0])
    schedule = SCHEDULES.entry("warmup_stable_decay")
    half = LearningRates(schedule(schedule.Options(decay_share=0.5)), 2.0, 0.4, 0, 8)
    assert [half.at(step) for step in range(8)] == pytest.approx([2.0] * 5 + [1.6, 1.2, 0.8])


@given(
    st.sampled_from(["constant", "linear", "cosine"]),
    st.integers(min_value=0, max_value=20),
    st.integers(min_value=1, max_value=60),
)
def test_the_bits_are_those_of_the_formulas(scheduler, warmup_steps, total_steps):
    def formula(step):
        if step < warmup_steps:
            return 2.0 * (step + 1) / (warmup_steps + 1)
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return {
            "constant": 2.0,
            "linear": 2.0 * (1.0 - progress),
            "cosine": 2.0 * 0.5 * (1.0 + math.cos(math.pi * progress)),
        }[scheduler]

    assert rates(scheduler, warmup_steps, total_steps) == [formula(step) for step in range(total_steps)]


@given(
    st.sampled_from(sorted(MADE)),
    st.integers(min_value=0, max_value=20),
    st.integers(min_value=1, max_value=60),
    st.sampled_from([0.0, 0.3, 2.0]),
)
def test_every_rate_is_positive_and_within_its_limits(scheduler, warmup_steps, total_steps, lowest):
    warmup_steps = min(warmup_steps, total_steps)
    values = rates(scheduler, warmup_steps, total_steps, lowest)
    assert all(0 < value <= 2.0 + 1e-12 for value in values)
    assert all(value >= lowest - 1e-12 for value in values[warmup_steps:])


class Given(LearningRateSchedule):
    """Returns what it was made with."""

    name = "given"

    def __init__(self, value):
        self.value = value

    def factor(self, progress):
        return self.value


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, 1.0000001, True, "1", None])
def test_a_factor_that_is_none_is_named_with_the_entry(value):
    with pytest.raises(EntryError) as caught:
        LearningRates(Given(value), 1.0, 0.0, 2, 10).at(6)
    place, _, rest = str(caught.value).partition(": ")
    assert place.startswith(f"{__file__}:")
    assert rest == (
        f"train.lr_scheduler: found given, whose factor(0.5), of step 6, is {value!r}; "
        "expected a finite number from 0 to 1"
    )


@pytest.mark.parametrize(("warmup_steps", "total_steps"), [(0, 1), (3, 3), (5, 7), (100, 1000), (0, 10**9)])
def test_the_steps_that_are_tried_contain_the_edges(warmup_steps, total_steps):
    steps = LearningRates(Given(1), 1.0, 0.0, warmup_steps, total_steps).some_steps()
    assert steps[0] == 0 and steps[-1] == total_steps - 1 and len(steps) <= 205
    assert {step for step in (warmup_steps - 1, warmup_steps) if 0 <= step < total_steps} <= set(steps)
