"""The DeepSpeed boundary: a ZeRO-3 engine around a stage, and every workaround it needs.

Each workaround names what happens without it; `tests/distributed/test_zero.py` shows those that can be shown.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ebft_mega.parallel.groups import ProcessGroups

SUPPORTED_DEEPSPEED = "0.19."
# Larger than any model: all parameters of an optimizer group form one sub-group on every rank.
SUB_GROUP_SIZE = int(1e12)


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and how its gradients are kept."""

    betas: tuple[float, float]
    weight_decay: float  # on matrices; norms and biases have none
    grad_clip: float  # global L2 norm; 0 turns clipping off
    dtype: torch.dtype  # of parameters and activations; gradients and master weights are float32
    micro_batch_size: int


@dataclass(frozen=True)
class Update:
    """What an optimizer step did."""

    grad_norm: float  # global, before clipping; inf when a gradient was not finite
    applied: bool  # False: every rank skipped the step


class ZeroEngine:
    """A stage whose parameters, gradients and optimizer state are partitioned over the data-parallel group.

    Communication: every method is collective over the data-parallel group.
    """

    def __init__(
        self,
        build_stage: Callable[[], nn.Module],
        load: Callable[[nn.Module, Callable[[nn.Parameter], Any], bool], None],
        settings: OptimizerSettings,
        groups: ProcessGroups,
    ):
        """Build a partitioned stage, fill it, and wrap it in an engine.

        Args:
            build_stage: makes the module; its parameters are partitioned as they are made, so no rank ever holds
                the whole model.
            load: fills the module given (module, context that makes one parameter whole, whether this rank reads).
            settings, groups: see there.
        """
        if groups.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # spares every rank a warning
        import deepspeed

        _check_version(deepspeed.__version__)
        _disable_shared_memory_collectives()
        _quiet_renamed_collectives()
        self._deepspeed = deepspeed
        self._groups = groups
        config = _deepspeed_config(settings, groups)
        # No `dtype` argument: with it, DeepSpeed 0.19.8 makes every parameter bfloat16 on a CPU, whatever it says.
        with deepspeed.zero.Init(
            data_parallel_group=groups.data_parallel,
            config_dict_or_path=config,
            mem_efficient_linear=False,  # it replaces torch.nn.functional.linear for the whole process
        ):
            module = build_stage()
        load(module, self._whole_for_writing, groups.data_parallel_rank == 0)
        # torch's AdamW: DeepSpeed's own would compile a C++ extension at start-up (minutes on a CPU).
        optimizer = torch.optim.AdamW(_parameter_groups(module, settings.weight_decay), lr=0.0, betas=settings.betas)
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        self._view = _empty_view(build_stage, groups.device)
        self._pairs = list(zip(self.module.parameters(), self._view.parameters(), strict=True))

    @property
    def module(self) -> nn.Module:
        """The partitioned module."""
        return self._engine.module

    def forward(self, compute: Callable[[Any], Any]) -> Any:
        """Run `compute(stage)` with parameters gathered layer by layer, recording gradients."""
        return self._engine(compute)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's share of the loss.

        Args:
            loss: shares add up over micro-batches and ranks to the loss of the step. DeepSpeed averages gradients
                over the data-parallel ranks, hence the factor.
        """
        self._engine.backward(loss * self._groups.data_parallel_size)

    def step(self, learning_rate: float) -> Update:
        """Clip by the global norm and apply AdamW; a gradient that is not finite anywhere skips the step everywhere."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        # DeepSpeed copies the first micro-batch's gradients into this buffer and adds the later ones, but never
        # clears it: a parameter without gradient in the first backward pass would add to the last step's gradient.
        self._engine.optimizer.grad_partitions_flat_buffer.zero_()
        applied = bool(self._engine.was_step_applied())
        norm = self._engine.get_global_grad_norm()
        return Update(float(norm) if norm is not None else float("inf"), applied)

    @contextmanager
    def whole_parameters(self) -> Iterator[Any]:
        """Gather all parameters once and give a view of the stage without engine hooks.

        With the hooks on, every decode pass would gather every layer again. The view's storage is the gathered
        one, so it must be let go before the engine can free it.
        """
        parameters = [parameter for parameter, _ in self._pairs]
        with self._deepspeed.zero.GatheredParameters(parameters):
            for parameter, twin in self._pairs:
                twin.data = parameter.data
            try:
                yield self._view
            finally:
                self._release_view()

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Name and float32 master weights of every parameter, one at a time, whole on every rank."""
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self.module.named_parameters():
            yield name, safe_get_full_fp32_param(parameter)

    def _release_view(self) -> None:
        for parameter, twin in self._pairs:
            twin.data = torch.empty(0, dtype=parameter.dtype, device=self._groups.device)

    def _whole_for_writing(self, parameter: nn.Parameter) -> Any:
        return self._deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


def _empty_view(build_stage: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """The stage without engine hooks and without storage, for passes under one gathering of all parameters.

    It is built anew because a stage holds process groups, which cannot be copied; on the meta device because it never
    owns a weight.
    """
    with torch.device("meta"):
        view = build_stage()
    for module in view.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(0, dtype=parameter.dtype, device=device)
            setattr(module, name, nn.Parameter(empty, requires_grad=False))
    return view.eval()


def _check_version(version: str) -> None:
    """Refuse a DeepSpeed whose internals were never checked against this module."""
    if not version.startswith(SUPPORTED_DEEPSPEED):
        raise RuntimeError(f"deepspeed {version} found; this engine was checked with {SUPPORTED_DEEPSPEED}*")


def _quiet_renamed_collectives() -> None:
    """DeepSpeed calls collectives that torch has renamed; one warning a call would bury the log."""
    warnings.filterwarnings("ignore", message=r".* is deprecated\. Please use .*_single", category=FutureWarning)


def _disable_shared_memory_collectives() -> None:
    """Keep DeepSpeed from compiling its CPU collectives: 40 s a job, and 69 MB of /dev/shm leaked per rank."""
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay; norms and biases without."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in module.parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # partitioned parameters look empty
        (matrices if len(shape) > 1 else vectors).append(parameter)
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def _deepspeed_config(settings: OptimizerSettings, groups: ProcessGroups) -> dict[str, Any]:
    """The one place where a DeepSpeed configuration is written."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        # Micro-batches are accumulated here: DeepSpeed would divide the gradients of every backward() by this.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.grad_clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 3,
            "contiguous_gradients": True,
            "overlap_comm": groups.device.type == "cuda",
            "sub_group_size": SUB_GROUP_SIZE,
            "stage3_gather_16bit_weights_on_model_save": False,
            "log_trace_cache_warnings": False,
        },
    }
    if settings.dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True}
        # Without it, gradients of micro-batches are accumulated in bfloat16.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
