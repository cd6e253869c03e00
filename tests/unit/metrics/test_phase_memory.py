"""High-water marks of phases: by a gauge that is moved by hand, and by the kernel's."""

import mmap
import resource

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ebft_mega.metrics.phase_memory import DeviceMemory, PhaseMemory, ResidentMemory

MIB = 2**20


class Gauge:
    """What a process holds, set by hand."""

    def __init__(self, can_restart=True):
        self.can_restart = can_restart
        self.held = self.mark = 0

    def hold(self, held):
        self.held = held
        self.mark = max(self.mark, held)

    def peak(self):
        return self.mark

    def restart(self):
        assert self.can_restart
        self.mark = self.held


def test_each_phase_has_the_peak_of_its_own_time():
    gauge = Gauge()
    memory = PhaseMemory(gauge)
    gauge.hold(100)
    gauge.hold(10)  # between phases
    memory.enter("rollout")
    gauge.hold(70)
    gauge.hold(30)
    memory.leave()
    memory.enter("learn")
    gauge.hold(20)
    memory.leave()
    assert memory.peaks() == {"rollout": 70, "learn": 30}  # learn began with 30
    assert memory.highest() == 100


def test_an_inner_phase_counts_for_the_outer_one_too():
    gauge = Gauge()
    memory = PhaseMemory(gauge)
    memory.enter("learn")
    gauge.hold(5)
    memory.enter("update")
    gauge.hold(9)
    gauge.hold(1)
    memory.leave()
    gauge.hold(3)
    memory.leave()
    assert memory.peaks() == {"learn": 9, "update": 9}


@given(st.lists(st.tuples(st.sampled_from(["enter", "leave", "reset"]), st.sampled_from("abc"), st.integers(0, 99))))
def test_any_order_of_phases_against_all_readings(actions):
    gauge, open_phases, expected, highest = Gauge(), [], {}, 0
    memory = PhaseMemory(gauge)
    for action, name, held in actions:
        if action == "enter":
            memory.enter(name)
            open_phases.append(name)
            expected[name] = max(expected.get(name, 0), gauge.held)
        elif action == "leave" and open_phases:
            memory.leave()
            open_phases.pop()
        elif action == "reset" and not open_phases:
            memory.reset()
            expected.clear()
        gauge.hold(held)
        highest = max(highest, held)
        for phase in open_phases:
            expected[phase] = max(expected[phase], held)
    while open_phases:
        memory.leave()
        open_phases.pop()
    assert memory.peaks() == expected and memory.highest() == highest


def test_a_gauge_that_cannot_begin_anew_tells_no_phases_apart():
    gauge = Gauge(can_restart=False)
    memory = PhaseMemory(gauge)
    memory.enter("rollout")
    gauge.hold(7)
    memory.leave()
    assert memory.peaks() == {} and memory.highest() == 7


def test_resident_memory_of_this_process():
    gauge = ResidentMemory()
    if not gauge.can_restart:
        pytest.skip("this kernel does not let a process set its high-water mark back")
    memory = PhaseMemory(gauge)
    for phase, size in (("large", 128 * MIB), ("small", 16 * MIB)):
        memory.enter(phase)
        # Not a tensor: malloc may have room for it in blocks that other tests have freed, which are resident already.
        with mmap.mmap(-1, size) as pages:
            for offset in range(0, size, mmap.PAGESIZE):
                pages[offset] = 1
        memory.leave()
    peaks = memory.peaks()
    assert peaks["large"] - peaks["small"] > 100 * MIB
    assert memory.highest() >= peaks["large"] > gauge.peak()


def test_resident_memory_without_permission(tmp_path):
    (tmp_path / "status").write_text("VmHWM:\t 12 kB\n")
    (tmp_path / "clear_refs").mkdir()  # nobody can write to it
    gauge = ResidentMemory(tmp_path)
    assert not gauge.can_restart
    assert gauge.peak() == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, rel=0.1)


def test_resident_memory_is_read_from_what_the_kernel_says(tmp_path):
    (tmp_path / "status").write_text("Name:\tx\nVmPeak:\t 99 kB\nVmHWM:\t    12 kB\nVmRSS:\t 3 kB\n")
    gauge = ResidentMemory(tmp_path)
    assert gauge.can_restart and gauge.peak() == 12 * 1024
    assert (tmp_path / "clear_refs").read_text() == "5"


def test_device_memory_asks_torch_s_allocator(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: calls.append(("peak", device)) or 42)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append(("reset", device)))
    device = torch.device("cuda", 1)
    memory = PhaseMemory.of_device(device)
    memory.enter("rollout")
    memory.leave()
    assert memory.peaks() == {"rollout": 42}
    assert calls == [("peak", device), ("reset", device)] * 2
    assert isinstance(memory._gauge, DeviceMemory)
