"""Phase times with a clock that is moved by hand."""

import pytest

from ebft_mega.metrics.timers import PhaseTimers


class Clock:
    def __init__(self):
        self.now = 0.0
        self.synchronized = 0

    def __call__(self):
        return self.now

    def synchronize(self):
        self.synchronized += 1
        self.now += 10.0  # queued work of the device ends


def test_repeated_and_nested_phases_add_up():
    clock = Clock()
    timers = PhaseTimers(clock=clock)
    for _ in range(2):
        with timers.phase("learn"):
            clock.now += 1.0
            with timers.phase("rollout"):
                clock.now += 2.0
    assert timers.seconds() == {"rollout": 4.0, "learn": 6.0}
    timers.reset()
    assert timers.seconds() == {}


def test_a_phase_that_raises_is_still_charged():
    clock = Clock()
    timers = PhaseTimers(clock=clock)
    with pytest.raises(RuntimeError), timers.phase("learn"):
        clock.now += 3.0
        raise RuntimeError
    assert timers.seconds() == {"learn": 3.0}


def test_device_work_is_charged_to_its_own_phase():
    clock = Clock()
    timers = PhaseTimers(synchronize=clock.synchronize, clock=clock)
    with timers.phase("rollout"):
        clock.now += 1.0
    assert timers.seconds() == {"rollout": 11.0}
    assert clock.synchronized == 2
