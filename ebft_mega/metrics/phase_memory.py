"""Peak memory of each phase of a step."""

import resource
from pathlib import Path
from typing import Protocol

import torch


class MemoryGauge(Protocol):
    """A high-water mark of this process's memory."""

    can_restart: bool

    def peak(self) -> int:
        """The most bytes held since the last restart."""

    def restart(self) -> None:
        """Begin anew, from what is held now."""


class DeviceMemory:
    """Bytes of tensors on a GPU, as torch's allocator counts them."""

    can_restart = True

    def __init__(self, device: torch.device):
        self._device = device

    def peak(self) -> int:
        """The most bytes allocated since the last restart."""
        return torch.cuda.max_memory_allocated(self._device)

    def restart(self) -> None:
        """Begin anew, from what is allocated now."""
        torch.cuda.reset_peak_memory_stats(self._device)


class ResidentMemory:
    """Bytes of this process in main memory: tensors, but also libraries, and what malloc keeps of freed blocks.

    Linux keeps a high-water mark per process that a process may set back (man 5 proc_pid_clear_refs). Where it may not,
    `can_restart` is False. Setting it back also lowers what others see as the largest size of this process
    (`ru_maxrss`).

    Args:
        directory: the kernel's files about this process.
    """

    def __init__(self, directory: Path = Path("/proc/self")):
        self._status = directory / "status"
        self._clear = directory / "clear_refs"
        self.can_restart = self._may_restart()

    def peak(self) -> int:
        """The most bytes resident since the last restart; since the start of the process without restarts."""
        if not self.can_restart:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        mark = next(line for line in self._status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(mark.split()[1]) * 1024

    def restart(self) -> None:
        """Begin anew, from what is resident now."""
        self._clear.write_text("5")

    def _may_restart(self) -> bool:
        try:
            self.restart()
            return "VmHWM:" in self._status.read_text()
        except OSError:
            return False


class PhaseMemory:
    """The most bytes held at any time within each phase, including what was held when it began.

    A phase that is entered within another one counts for both.

    Communication: none.
    """

    def __init__(self, gauge: MemoryGauge):
        self._gauge = gauge
        self._open: list[str] = []
        self._peaks: dict[str, int] = {}
        self._highest = 0

    @classmethod
    def of_device(cls, device: torch.device) -> "PhaseMemory":
        """Measure the GPU's memory, or on a CPU the resident size of the process."""
        return cls(DeviceMemory(device) if device.type == "cuda" else ResidentMemory())

    def enter(self, phase: str) -> None:
        """A phase begins."""
        self._read()
        self._open.append(phase)

    def leave(self) -> None:
        """The phase that was entered last ends."""
        self._read()
        self._open.pop()

    def peaks(self) -> dict[str, int]:
        """Bytes by phase since the last reset; empty if the gauge cannot tell phases apart."""
        return dict(self._peaks) if self._gauge.can_restart else {}

    def highest(self) -> int:
        """The most bytes ever held, in phases and outside of them."""
        self._read()
        return self._highest

    def reset(self) -> None:
        """Forget the phases measured so far, but not `highest`."""
        self._peaks.clear()

    def _read(self) -> None:
        """Charge what was held since the last reading to the phases that were open then."""
        peak = self._gauge.peak()
        if self._gauge.can_restart:
            self._gauge.restart()
        self._highest = max(self._highest, peak)
        for phase in self._open:
            self._peaks[phase] = max(self._peaks.get(phase, 0), peak)
