"""Peak memory of one step of one side, measured in a fresh process."""

import dataclasses
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

from ebft_mega.apps.benchmark.case import BenchCase, BenchModel

CLEAR_PEAK = "5"  # proc(5): resets the resident high-water mark to what is resident now


def peak_bytes_in_child(side: str, case: BenchCase, model: BenchModel) -> int:
    """Run one step of a side in a child process.

    Returns:
        Bytes. On a CPU the highest resident size during the step minus the resident size before it, on a GPU the same
        difference of allocated bytes. Weights, gradients and optimizer state exist before and are not counted.
    Raises:
        subprocess.CalledProcessError: the child failed; its message is on standard error.
    """
    request = json.dumps({"side": side, "case": dataclasses.asdict(case), "model": dataclasses.asdict(model)})
    command = [sys.executable, "-m", "ebft_mega.apps.benchmark.peak_memory", request]
    # A job of one process, even if this one is a rank of a larger job.
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return int(answer.stdout.splitlines()[-1])


def measure(side: str, case: BenchCase, model: BenchModel) -> int:
    """Run one step in this process and return the bytes that its peak is above the memory in use before it."""
    import torch

    from ebft_mega.apps.benchmark.sides import build_sides
    from ebft_mega.parallel.groups import connect, make_process_groups

    torch.set_num_threads(1)
    groups = make_process_groups(connect())
    built = build_sides([side], case, model, groups)[side]
    built.warm_up()
    gc.collect()
    if groups.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        built.run(0)
        return int(torch.cuda.max_memory_allocated()) - before
    Path("/proc/self/clear_refs").write_text(CLEAR_PEAK, encoding="ascii")
    before = _resident("VmRSS")
    built.run(0)
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    """A size in bytes from this process's status."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    print(measure(wanted["side"], BenchCase(**wanted["case"]), BenchModel(**wanted["model"])))
