"""What decides the bits of a run: kernels that give the same ones every time, and a description of all the rest."""

import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from ebft_mega.errors import Problem, SurroundingsError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
REPEATABLE_WORKSPACES = (":4096:8", ":16:8")  # of cuBLAS: with others it chooses between its kernels as it runs
# Of the environment only these are written down: each chooses kernels, threads or the order of sums.
VARIABLES = (
    *("OMP_NUM_THREADS", "OMP_DYNAMIC", "OMP_SCHEDULE", "OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY"),
    *("MKL_NUM_THREADS", "MKL_DYNAMIC", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "KMP_AFFINITY", "KMP_BLOCKTIME"),
    *("OPENBLAS_NUM_THREADS", "OPENBLAS_CORETYPE", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"),
    *(WORKSPACE, "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUDA_VISIBLE_DEVICES"),
    *("CUDA_LAUNCH_BLOCKING", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTHONHASHSEED"),
    *("NCCL_ALGO", "NCCL_PROTO", "NCCL_NTHREADS", "NCCL_MIN_NCHANNELS", "NCCL_MAX_NCHANNELS", "NCCL_BUFFSIZE"),
    *("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_NVLS_ENABLE", "NCCL_COLLNET_ENABLE"),
)


def require_repeatable_workspace(environment: Mapping[str, str]) -> None:
    """Refuse a workspace with which cuBLAS is not repeatable; none at all is well. No torch.

    Args:
        environment: of this process, whose run is deterministic.
    Raises:
        SurroundingsError: the environment sets such a workspace.
    """
    workspace = environment.get(WORKSPACE)
    if workspace is not None and workspace not in REPEATABLE_WORKSPACES:
        expected = f"{' or '.join(REPEATABLE_WORKSPACES)}, or nothing: deterministic is true"
        raise SurroundingsError([Problem("environment", WORKSPACE, repr(workspace), expected)])


def use_deterministic_kernels(environment: MutableMapping[str, str]) -> None:
    """Let torch choose kernels that give the same bits every time, and raise where it has none.

    Call it before CUDA starts.

    Args:
        environment: of this process; it gets a workspace of cuBLAS if it has none.
    Raises:
        SurroundingsError: the environment sets a workspace with which cuBLAS is not repeatable.
    Communication: none.
    """
    import torch

    require_repeatable_workspace(environment)
    environment.setdefault(WORKSPACE, REPEATABLE_WORKSPACES[0])
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def describe_numerics() -> dict[str, Any]:
    """Libraries, kernels, threads and processors of this process, as `environment.json` has them."""
    import torch

    return {
        "torch": {"build": torch.__config__.show().splitlines(), "git_version": torch.version.git_version},
        "threads": {
            "intra_op": torch.get_num_threads(),
            "inter_op": torch.get_num_interop_threads(),
            "parallel_info": torch.__config__.parallel_info().splitlines(),
        },
        "cpu": {"kernels": torch.backends.cpu.get_cpu_capability(), **_processor(Path("/proc/cpuinfo"))},
        "cuda": _cuda() if torch.cuda.is_available() else None,
        "deterministic": {
            "algorithms": torch.are_deterministic_algorithms_enabled(),
            "cudnn_deterministic": torch.backends.cudnn.deterministic,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
        },
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _processor(listing: Path) -> dict[str, Any]:
    """Model and instruction sets of the first processor; nothing where the system has no such list."""
    try:
        lines = listing.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0].splitlines()
    except OSError:
        return {}
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags") or facts.get("Features", "")
    return {"model": facts.get("model name"), "flags": sorted(flags.split())}


def _cuda() -> dict[str, Any]:
    import torch

    try:
        driver = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace").splitlines()[:1]
    except OSError:
        driver = []
    return {
        "version": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None,
        "driver": driver,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }
