"""The processors that a starter configuration is written for."""

from dataclasses import dataclass

import psutil

from ebft_mega.errors import InputError, Problem

BYTES_PER_GIGABYTE = 10**9


@dataclass(frozen=True)
class Machine:
    """Accelerators of one kind, or the processors of this machine as one."""

    processes: int  # one for each accelerator
    memory_bytes: int  # of each
    is_cpu: bool

    @property
    def gpu_gigabytes(self) -> float | None:
        """Memory of each GPU in 1e9 bytes; None: there is none."""
        return None if self.is_cpu else self.memory_bytes / BYTES_PER_GIGABYTE

    @property
    def words(self) -> str:
        """What it is, in a few words."""
        memory = f"{self.memory_bytes / BYTES_PER_GIGABYTE:.4g} GB"
        if self.is_cpu:
            return f"this machine's processor with {memory} of memory"
        return f"1 GPU of {memory}" if self.processes == 1 else f"{self.processes} GPUs of {memory} each"


def machine_for(gpus: int | None, gigabytes: float | None) -> Machine:
    """The machine as the command line names it; what it leaves out is asked of this machine.

    Args:
        gpus: number of accelerators.
        gigabytes: memory of each, in 1e9 bytes.

    Raises:
        InputError: the memory of GPUs is not given and cannot be found out here.
    """
    if gpus is not None and gigabytes is not None:
        return Machine(gpus, round(gigabytes * BYTES_PER_GIGABYTE), is_cpu=False)
    found = _accelerators_here()
    if gigabytes is not None:
        return Machine(len(found) or 1, round(gigabytes * BYTES_PER_GIGABYTE), is_cpu=False)
    if found:
        return Machine(gpus or len(found), min(found), is_cpu=False)
    if gpus is not None:
        expected = "also --gpu-memory GB, since this machine has no GPU that could be asked"
        raise InputError([Problem("--gpus", "number", str(gpus), expected)])
    return Machine(1, psutil.virtual_memory().total, is_cpu=True)


def _accelerators_here() -> list[int]:
    """Bytes of memory of each accelerator of this machine."""
    import torch

    devices = range(torch.cuda.device_count())
    return [torch.cuda.get_device_properties(device).total_memory for device in devices]
