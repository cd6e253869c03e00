"""Model FLOPs utilisation (MFU): a step's necessary FLOPs as a share of what the devices could do in its time."""

import re

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.config.schema import RunConfig
from ebft_mega.cost.rollout_nodes import RolloutNodes
from ebft_mega.cost.step_cost import StepShape, cost_of_step


def _peaks(bfloat16: float, float32: float) -> dict[str, float]:
    return {"bfloat16": bfloat16, "float32": float32}


# Dense peaks in TFLOP/s from NVIDIA's data sheets (half of a figure "with sparsity"); the first match is taken.
# bfloat16 is that of tensor cores, float32 that of CUDA cores: by default torch multiplies float32 without TF32.
PEAKS = (
    ("B200", _peaks(2250.0, 75.0)),
    ("GH200", _peaks(989.4, 66.9)),
    ("H200.*NVL", _peaks(835.5, 60.0)),
    ("H200", _peaks(989.4, 66.9)),
    ("H100.*NVL", _peaks(835.5, 60.0)),
    ("H100.*PCIe", _peaks(756.0, 51.2)),
    ("H100", _peaks(989.4, 66.9)),
    ("A100", _peaks(312.0, 19.5)),
    ("L40S", _peaks(362.05, 91.6)),
    ("L4", _peaks(121.0, 30.3)),
    ("A40", _peaks(149.7, 37.4)),
    ("A10", _peaks(125.0, 31.2)),
    ("RTX 4090$", _peaks(165.2, 82.6)),
    ("RTX 3090$", _peaks(71.0, 35.6)),
)


def model_flops_utilisation(
    config: RunConfig,
    architecture: Architecture,
    feature_architecture: Architecture,
    seconds: float,
    world_size: int,
    peak_flops_per_device: float,
    nodes: RolloutNodes | None = None,
) -> float:
    """Divide the necessary FLOPs of a step by what the devices could have computed in its time.

    Counted are the rollouts, the feature network, and the policy's backward pass (with `rl_coef: 0` its forward pass,
    too), but no token critic; each matrix product once, whatever `learn.reuse_rollout` and
    `train.activation_checkpointing` say: recomputation adds seconds, not utilisation. With `nodes` that is the work of
    distinct rows: what the devices did. Without, it is what they would have had to do if no two rollouts had begun
    alike: over the same seconds it may be more than 1, and it compares runs with merging and without.

    Args:
        architecture, feature_architecture: of the policy and of the frozen network (ignored with `rl_coef: 0`).
        seconds: wall time of the optimizer step; world_size: number of devices.
        peak_flops_per_device: dense peak in the training dtype, as `peak_flops` gives it.
        nodes: of a row's rollouts, the mean over rows; None: no two begin alike.
    Returns:
        A share.
    """
    shape = StepShape.of(config, architecture, feature_architecture, nodes)
    phases = cost_of_step(shape, "activations" if shape.uses_rollouts else "off").phases.values()
    per_row = sum(phase.flops.of_models for phase in phases)
    return per_row * config.train.global_batch_size / (seconds * world_size * peak_flops_per_device)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense peak of a GPU in floating-point operations per second.

    Args:
        device_name: as `torch.cuda.get_device_name` returns it; dtype: as `train.dtype`.
    Returns:
        None for a device that is not in the table, and for CPUs.
    """
    for name, peaks in PEAKS:
        if re.search(rf"\b{name}(\W|$)", device_name):
            return peaks[dtype] * 1e12
    return None
