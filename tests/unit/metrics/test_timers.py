"""Phase times with a clock that is moved by hand, and who else hears of phases."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ebft_mega.metrics.phase_memory import PhaseMemory
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


class Gauge:
    """Memory as a list of readings."""

    can_restart = True

    def __init__(self, readings):
        self.readings = iter(readings)

    def peak(self):
        return next(self.readings)

    def restart(self):
        pass


def test_phases_are_told_to_the_memory_also_when_they_raise():
    memory = PhaseMemory(Gauge([1, 5, 2, 9, 3]))
    timers = PhaseTimers(memory=memory)
    with timers.phase("rollout"):
        pass
    with pytest.raises(RuntimeError), timers.phase("learn"):
        raise RuntimeError
    assert memory.peaks() == {"rollout": 5, "learn": 9}
    timers.reset()
    assert memory.peaks() == {} and memory.highest() == 9


def test_phases_are_ranges_of_a_profile():
    timers = PhaseTimers()
    with profile(activities=[ProfilerActivity.CPU]) as recorded, timers.phase("learn"):
        torch.ones(3).exp()
    (phase,) = [event for event in recorded.events() if event.name == "learn"]
    assert "aten::exp" in [event.name for event in phase.cpu_children]
