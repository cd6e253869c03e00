"""Import DeepSpeed in a supported version, and write the configurations that it is given."""

import os
import warnings
from typing import Any

import torch

from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.parallel.optimizer import OptimizerSettings

SUPPORTED_DEEPSPEED = "0.19."
# Larger than any model: all parameters of an optimizer group form one sub-group on every rank. (Smaller ones would save
# temporaries, but norms are summed by sub-group: other numbers of them on two ranks of a replica deadlock.)
SUB_GROUP_SIZE = int(1e12)
# Gradients are reduced this many at a time, in float32: a buffer of 64 MiB. (`planning/memory.py` counts it.)
REDUCE_ELEMENTS = 2**24


def import_deepspeed(groups: ProcessGroups) -> Any:
    """Import DeepSpeed and set it up for this process.

    Raises:
        RuntimeError: a release whose internals were never checked against this module.
    """
    if groups.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # spares every rank a warning
    import deepspeed

    check_version(deepspeed.__version__)
    disable_shared_memory_collectives()
    # DeepSpeed calls collectives that torch has renamed; one warning a call would bury the log.
    warnings.filterwarnings("ignore", message=r".* is deprecated\. Please use .*_single", category=FutureWarning)
    return deepspeed


def check_version(version: str) -> None:
    """Refuse a DeepSpeed whose internals were never checked against this module."""
    if not version.startswith(SUPPORTED_DEEPSPEED):
        raise RuntimeError(f"deepspeed {version} found; this engine was checked with {SUPPORTED_DEEPSPEED}*")


def disable_shared_memory_collectives() -> None:
    """Keep DeepSpeed from compiling its CPU collectives: 40 s a job, and 69 MB of /dev/shm leaked per rank."""
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False


def deepspeed_config(settings: OptimizerSettings, groups: ProcessGroups) -> dict[str, Any]:
    """The one place where a DeepSpeed configuration is written."""
    zero_stage = settings.zero_stage
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        # Micro-batches are accumulated by us: DeepSpeed would divide the gradient of every backward pass by this, and
        # on an earlier pipeline stage a gradient that the later ones have divided already.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.grad_clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": zero_stage,
            # Stage 3 would allocate the buffer for good, and copies once more from it.
            "contiguous_gradients": zero_stage < 3,
            # Stage 1 would then have to know in advance which backward pass is a step's last one; stage 2 was never
            # run with it.
            "overlap_comm": zero_stage == 3 and groups.device.type == "cuda",
            "reduce_bucket_size": REDUCE_ELEMENTS,
        },
    }
    if zero_stage == 3:
        config["zero_optimization"] |= {
            "sub_group_size": SUB_GROUP_SIZE,
            # Otherwise small parameters stay whole sometimes, and what a gather costs depends on that.
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": False,
            "log_trace_cache_warnings": False,
        }
    else:
        # Stages 1 and 2 take every backward pass for a step's last one otherwise.
        config["managed_gradient_accumulation"] = False
    if settings.dtype == torch.bfloat16:
        # Stage 1 would keep a bfloat16 gradient of every parameter beside the float32 one.
        config["bf16"] = {"enabled": True, "immediate_grad_update": True}
        # Without these, gradients are added up in bfloat16 over micro-batches and over ranks.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    return config


def frozen_config(dtype: torch.dtype) -> dict[str, Any]:
    """Configuration for parameters that are only partitioned: no engine, so no second one beside the policy's.

    (DeepSpeed keeps one Megatron-like object for the whole process, and a second engine would ask the first one's.)

    Args:
        dtype: of the parameters; DeepSpeed makes every new tensor what the configuration says.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
