"""The DeepSpeed boundary: one engine for each (tensor, pipeline) coordinate, and every workaround that takes.

Workarounds name what happens without them; `tests/distributed/test_zero_traps.py` shows it. Not worked round, but kept
to: a stage calls its own submodules (a weight that is read without calling its module is not gathered), runs one
backward pass per forward pass (several within one would reduce a parameter twice), is built anew rather than copied,
and is saved through `state_tensors` (a partitioned module's state_dict is empty).
"""

import functools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.parallel.optimizer import (
    Loader,
    OptimizerSettings,
    SharedGradients,
    StageRunner,
    Update,
    parameter_groups,
    runner,
    sum_over,
)
from ebft_mega.parallel.optimizer_state import StateKind, applied_updates, prepare_moments
from ebft_mega.parallel.replicated import replicated_module
from ebft_mega.parallel.roles import ParameterRole

SUPPORTED_DEEPSPEED = "0.19."
# Larger than any model: all parameters of an optimizer group form one sub-group on every rank.
SUB_GROUP_SIZE = int(1e12)
# Stands for a module that uses a parameter; theirs are numbers.
HOLDER = "ebft_mega"
# Parameters are gathered this many at a time: the gathered buffer exists beside the parameters made from it.
GATHER_ELEMENTS = 2**29
# Gradients are reduced this many at a time, in float32: a buffer of 1 GiB.
REDUCE_ELEMENTS = 2**28


class DeepSpeedEngine:
    """A stage whose optimizer state (stages 1 to 3), gradients (2, 3) and parameters (3) are partitioned."""

    def __init__(
        self,
        build_stage: Callable[[], nn.Module],
        load: Loader,
        roles: Callable[[nn.Module], Mapping[str, ParameterRole]],
        settings: OptimizerSettings,
        groups: ProcessGroups,
    ):
        """As `ZeroEngine`."""
        deepspeed = import_deepspeed(groups)
        self._groups = groups
        self._stage = settings.zero_stage
        # DeepSpeed's stage 1 in bfloat16 is another optimizer, with a whole float32 gradient on every rank.
        self._whole_gradients = settings.zero_stage == 1 and settings.dtype == torch.bfloat16
        config = deepspeed_config(settings, groups)
        if self._stage == 3:
            module = partitioned_module(build_stage, load, config, groups)
            check_traces_within(groups)
        else:
            module = replicated_module(build_stage, load, groups)
        self._shared = SharedGradients.of(module, roles(module), groups.tensor_parallel_rank)
        mark_counted(module, self._shared)
        # torch's AdamW: DeepSpeed's own would compile a C++ extension at start-up (minutes on a CPU).
        optimizer = torch.optim.AdamW(parameter_groups(module, settings.weight_decay), lr=0.0, betas=settings.betas)
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, mpu=MegatronUnit(groups)
        )
        check_equal_sub_groups(len(self._sub_groups()), groups)
        self._places = {
            parameter: (group, index)
            for group, parameters in enumerate(self._sub_groups())
            for index, parameter in enumerate(parameters)
        }
        self._reduced_step = self._engine.optimizer.step
        # The moment between the reduction of gradients and their norm is inside the engine's step.
        self._engine.optimizer.step = self._step_of_reduced_gradients
        self._hold_parameters = settings.hold_parameters if self._stage == 3 else "anyway"
        self._view = view_of(self.module, build_stage) if self._stage == 3 else self.module

    @property
    def module(self) -> nn.Module:
        """See `ZeroEngine`."""
        return self._engine.module

    def forward(self, compute: Callable[[Any], Any]) -> Any:
        """See `ZeroEngine`."""
        if self._hold_parameters == "step":
            hold(self.module.parameters())
        return self._engine(compute)

    def backward(self, loss: Tensor) -> None:
        """See `ZeroEngine`."""
        self._begin_backward()
        # DeepSpeed averages gradients over the data-parallel ranks; earlier stages inherit the factor.
        self._engine.backward(loss * self._groups.data_parallel_size)

    def backward_from(self, output: Tensor, gradient: Tensor) -> None:
        """See `ZeroEngine`."""
        self._begin_backward()
        output.backward(gradient)

    def step(self, learning_rate: float) -> Update:
        """See `ZeroEngine`."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        self._forget_gradients()
        applied = bool(self._engine.was_step_applied())
        return Update(float(self._engine.get_global_grad_norm()) if applied else float("inf"), applied)

    @contextmanager
    def whole_parameters(self, recording: bool) -> Iterator[StageRunner]:
        """See `ZeroEngine`.

        All parameters at once, in a view of the stage without engine hooks: with them on, every decode pass would
        gather every layer again and release what was gathered here. Layer by layer it has to be the hooks, which find
        a tied head's weight too, but only inside of the engine's forward.
        """
        assert not recording or self._hold_parameters in ("step", "anyway"), (
            "parameters that are let go have no values for the backward pass"
        )
        if self._hold_parameters == "none":
            yield self._run_by_layer
            return
        parameters = list(self.module.parameters())
        gathered: list[Any] = []
        if self._hold_parameters == "step":
            hold(parameters)
        elif self._hold_parameters == "rollout":
            gathered = gather(parameters)
        try:
            yield runner(self._view, recording)
        finally:
            release(gathered)

    @torch.no_grad()
    def _run_by_layer(self, compute: Callable[[Any], Any]) -> Any:
        return self._engine(compute)

    def state_tensors(self, kind: StateKind) -> Iterator[tuple[str, Tensor]]:
        """See `ZeroEngine`; a new tensor each."""
        for name, parameter in self.module.named_parameters():
            yield name, self._whole_state(kind, parameter)

    @property
    def applied_updates(self) -> int:
        """See `ZeroEngine`."""
        return applied_updates(self._engine.optimizer.optimizer, self._flat_partitions())

    def prepare_moments(self, applied_updates: int) -> None:
        """Make AdamW's state where there is none yet, and set its count.

        Without it a fresh engine has nothing to put moments into (KeyError).
        """
        prepare_moments(self._engine.optimizer.optimizer, self._flat_partitions(), applied_updates)

    def set_state(self, kind: StateKind, parameter: nn.Parameter, value: Tensor) -> None:
        """Replace a parameter's master weight or moment, after `prepare_moments`.

        Args:
            value: the whole parameter's, float32; every rank keeps its partition.
        """
        if self._stage == 3:
            set_partition(kind, parameter, value, self._groups.data_parallel_rank)
        elif (found := self._fragment(kind, parameter)) is not None:
            fragment, start = found
            fragment.copy_(value.flatten()[start : start + len(fragment)])

    def _whole_state(self, kind: StateKind, parameter: Any) -> Tensor:
        """A parameter's whole master weight or moment, on every rank."""
        if kind != "weights" and self.applied_updates == 0:
            # AdamW makes its moments in its first step.
            shape = getattr(parameter, "ds_shape", parameter.shape)
            return torch.zeros(shape, dtype=torch.float32, device=self._groups.device)
        if self._stage < 3:
            found = self._fragment(kind, parameter)
            return whole_of_fragments(parameter, found, self._groups.data_parallel)
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        whole: Tensor
        if kind == "weights":
            whole = safe_get_full_fp32_param(parameter)
        else:
            whole = safe_get_full_optimizer_state(parameter, kind)
        return whole

    def _fragment(self, kind: StateKind, parameter: Any) -> tuple[Tensor, int] | None:
        """This rank's part of a parameter's master weight or moment below stage 3, and where in it the part begins.

        The optimizer's own storage. DeepSpeed's functions find moments through links, which it makes after the first
        group's first step: the parameters of all other groups are left without.
        """
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = self._flat_partitions()[self._places[parameter][0]]
        if kind != "weights":
            flat = self._engine.optimizer.optimizer.state[flat][kind]
        address = mapping.hp_fragment_address
        return flat.detach().narrow(0, address.start, address.numel), mapping.lp_fragment_address.start

    def _flat_partitions(self) -> Sequence[Tensor]:
        """What AdamW steps on: this rank's float32 partition of each group of parameters."""
        optimizer = self._engine.optimizer
        partitions: Sequence[Tensor]
        if self._whole_gradients:
            partitions = optimizer.fp32_groups_flat_partition
        elif self._stage == 3:
            partitions = optimizer.fp32_partitioned_groups_flat
        else:
            partitions = optimizer.single_partition_of_fp32_groups
        return partitions

    def _begin_backward(self) -> None:
        """Tell the optimizer that a new micro-batch's gradients come.

        It learns it from forward passes. Where backward passes follow each other, stage 3 would take the second for a
        part of the first and overwrite its gradients; and on all but the last pipeline stage gradients of the second
        would never be reduced.
        """
        self._engine.optimizer.clear_backward_seen_flag()

    def _forget_gradients(self) -> None:
        """Zero the buffer of gradient partitions.

        At stage 3 a step's first micro-batch is copied there and the others are added, but nothing clears it: a
        parameter without gradient in the first micro-batch would add to the last step's gradient.
        """
        if self._stage == 3:
            self._engine.optimizer.grad_partitions_flat_buffer.zero_()

    def _sub_groups(self) -> Sequence[Sequence[nn.Parameter]]:
        optimizer = self._engine.optimizer
        if self._whole_gradients:
            return optimizer.bf16_groups
        return optimizer.fp16_groups if self._stage == 3 else optimizer.bit16_groups

    def _step_of_reduced_gradients(self) -> None:
        self._sum_partial_gradients()
        self._sum_tied_gradients()
        self._spread_non_finite()
        self._reduced_step()

    def _sum_partial_gradients(self) -> None:
        """Add up gradients of which every tensor-parallel rank has a share; DeepSpeed knows none of those ranks.

        Without it each rank would step with its own share, and the replicas drift apart.
        """
        pieces = [self._gradient(parameter) for parameter in self._shared.partial]
        sum_over(self._groups.tensor_parallel, [piece for piece in pieces if piece is not None])

    def _sum_tied_gradients(self) -> None:
        """Add up the gradients of a weight that is on both ends of the pipeline."""
        from deepspeed.utils import safe_get_full_grad, safe_set_full_grad

        if self._stage == 3 or self._whole_gradients:
            pieces = [self._gradient(parameter) for parameter in self._shared.tied]
            sum_over(self._groups.embedding, [piece for piece in pieces if piece is not None])
            return
        # Stages 1 and 2 cut a stage's parameters end to end, so both ends of the pipeline cut this one differently.
        for parameter in self._shared.tied:
            whole = safe_get_full_grad(parameter)
            sum_over(self._groups.embedding, [whole])
            safe_set_full_grad(parameter, whole)

    def _spread_non_finite(self) -> None:
        """Let all ranks skip a step whose gradient is not finite in a parameter that no norm counts."""
        if dist.get_world_size(self._groups.model_parallel) == 1:
            return
        bad = torch.zeros((), device=self._groups.device)
        for parameter in self._shared.uncounted:
            piece = self._gradient(parameter)
            if piece is not None:
                bad += ~piece.isfinite().all()
        dist.all_reduce(bad, group=self._groups.data_parallel)
        dist.all_reduce(bad, group=self._groups.model_parallel)
        if bad > 0:
            for parameter in self._places:
                piece = self._gradient(parameter)
                if piece is not None:
                    piece.fill_(torch.nan)

    def _gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """This data-parallel rank's part of a reduced gradient, float32, the optimizer's own storage."""
        group, index = self._places[parameter]
        if self._whole_gradients:
            return self._engine.optimizer.fp32_groups_gradients[group][index]
        if self._stage == 3:
            return self._engine.optimizer.averaged_gradients[group][index]
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        return mapping.get_lp_grad_fragment(parameter._index_in_param_group)  # type: ignore[attr-defined]


class MegatronUnit:
    """Our groups under the names by which DeepSpeed asks for them.

    It has no tensor-parallel methods on purpose: DeepSpeed counts in norms every parameter of tensor-parallel rank 0
    (stages 1 and 2) or model-parallel rank 0 (stage 3), whatever its marks. Without those methods it takes the second
    for the first. On that rank everything counts; on rank 0 of a later stage a tied weight would count twice.
    """

    def __init__(self, groups: ProcessGroups):
        """Take the groups of this process."""
        self._groups = groups

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Ranks with other rows."""
        return self._groups.data_parallel

    def get_data_parallel_world_size(self) -> int:
        """Number of those."""
        return self._groups.data_parallel_size

    def get_data_parallel_rank(self) -> int:
        """Place among those."""
        return self._groups.data_parallel_rank

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """All ranks of one replica: norms are summed over them, so the pipeline's ranks must be in it."""
        return self._groups.model_parallel

    def get_model_parallel_world_size(self) -> int:
        """Number of those."""
        return dist.get_world_size(self._groups.model_parallel)

    def get_model_parallel_rank(self) -> int:
        """Place among those."""
        return dist.get_rank(self._groups.model_parallel)


def import_deepspeed(groups: ProcessGroups) -> Any:
    """DeepSpeed, set up for this process.

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


def check_traces_within(groups: ProcessGroups) -> None:
    """Let ranks compare the order in which they gather parameters only with those they gather with.

    DeepSpeed compares over the whole world when a forward pass begins: pipeline stages have other modules, which is an
    error, and begin at other times, which is a deadlock.
    """
    from deepspeed.runtime.zero import partitioned_param_coordinator

    check = functools.partial(assert_same_over, groups.data_parallel, groups.device)
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = check


def assert_same_over(group: dist.ProcessGroup, device: torch.device, values: Sequence[int]) -> None:
    """Raise if this rank has other integers than the first one of its group.

    Raises:
        RuntimeError: it has.
    Communication: two broadcasts.
    """
    length = torch.tensor(len(values), device=device)
    dist.broadcast(length, group=group, group_src=0)
    expected = torch.tensor(values, dtype=torch.long, device=device)
    if len(values) != length:
        expected = torch.zeros(int(length), dtype=torch.long, device=device)
    dist.broadcast(expected, group=group, group_src=0)
    if expected.tolist() != list(values):
        raise RuntimeError(f"rank {dist.get_rank()} runs modules {list(values)}, its peers {expected.tolist()}")


def mark_counted(module: nn.Module, shared: SharedGradients) -> None:
    """Say which parameters count in the global gradient norm: each one once over the replica.

    By itself DeepSpeed counts all of model-parallel rank 0 and elsewhere what megatron-core's initialisers marked,
    which here did not run: norms, the clipping and so the update would be silently wrong on every later stage.
    """
    uncounted = set(shared.uncounted)
    for parameter in module.parameters():
        marked: Any = parameter
        marked.model_parallel = marked.tensor_model_parallel = parameter not in uncounted


def check_equal_sub_groups(number: int, groups: ProcessGroups) -> None:
    """Refuse ranks of a replica with different numbers of optimizer sub-groups.

    DeepSpeed sums the norm of one after the other over the replica; a rank with more would wait for ever.

    Raises:
        RuntimeError: on every rank of the replica.
    Communication: one all-gather over the replica.
    """
    numbers = [torch.zeros((), dtype=torch.long, device=groups.device) for _ in range(groups.model_parallel.size())]
    dist.all_gather(numbers, torch.tensor(number, device=groups.device), group=groups.model_parallel)
    found = [int(value) for value in numbers]
    if len(set(found)) > 1:
        raise RuntimeError(f"the ranks of a replica have {found} optimizer sub-groups; they must have equally many")


def partitioned_module(
    build_stage: Callable[[], nn.Module], load: Loader, config: dict[str, Any], groups: ProcessGroups
) -> nn.Module:
    """A stage whose parameters are partitioned as they are made, so that no rank ever holds it whole.

    Communication: over the data-parallel group, whose first rank reads the values.
    """
    deepspeed = import_deepspeed(groups)
    # No `dtype` argument: with it, DeepSpeed 0.19.8 makes every parameter bfloat16 on a CPU, whatever it says.
    with deepspeed.zero.Init(
        data_parallel_group=groups.data_parallel,
        config_dict_or_path=config,
        mem_efficient_linear=False,  # it replaces torch.nn.functional.linear for the whole process
    ):
        module = build_stage()

    def whole_for_writing(parameter: nn.Parameter) -> Any:
        return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)

    load(module, whole_for_writing, groups.data_parallel_rank == 0)
    return module


def view_of(module: nn.Module, build_stage: Callable[[], nn.Module]) -> nn.Module:
    """The same parameters in a stage without engine hooks, for passes while all of them are whole.

    It is built anew because a stage holds process groups, which cannot be copied; on the meta device because it never
    owns a weight.
    """
    with torch.device("meta"):
        view = build_stage()
    for owner, twin in zip(module.modules(), view.modules(), strict=True):
        for name, parameter in owner.named_parameters(recurse=False):
            setattr(twin, name, parameter)
    return view.eval()


def whole_of_fragments(parameter: Tensor, own: tuple[Tensor, int] | None, group: dist.ProcessGroup) -> Tensor:
    """A parameter's master weight or moment from the ranks' fragments of it, bit for bit.

    DeepSpeed's own function adds fragments up as numbers, which makes a positive zero of a negative one; here their
    bits are added to bits that are not set anywhere else.

    Args:
        own: this rank's fragment, float32, and where it begins; None: it has none.
    Communication: one all-reduce of 4 bytes per element.
    """
    bits = torch.zeros(parameter.numel(), dtype=torch.int32, device=parameter.device)
    if own is not None:
        fragment, start = own
        bits[start : start + len(fragment)] = fragment.view(torch.int32)
    dist.all_reduce(bits, group=group)
    return bits.view(torch.float32).view_as(parameter)


def set_partition(kind: StateKind, parameter: Any, value: Tensor, data_parallel_rank: int) -> None:
    """Replace this rank's partition of a parameter's master weight or moment (stage 3).

    DeepSpeed's function for whole values fails on the last ranks where a parameter's elements do not divide evenly:
    their partitions are longer than what is left of it.

    Args:
        value: the whole parameter's, float32.
    """
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    size = parameter.ds_tensor.numel()
    part = value.flatten()[data_parallel_rank * size : (data_parallel_rank + 1) * size]
    part = F.pad(part, (0, size - len(part)))
    if kind == "weights":
        safe_set_local_fp32_param(parameter, part)
    else:
        safe_set_local_optimizer_state(parameter, part, kind)


def gather(parameters: Iterable[Any]) -> list[Any]:
    """Make partitioned parameters whole on every rank.

    Returns:
        Those that were not whole before.
    Communication: over the data-parallel group one all-gather per `GATHER_ELEMENTS` elements. (DeepSpeed's own
        `GatheredParameters` makes one for each parameter.)
    """
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    missing = [parameter for parameter in parameters if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE]
    bucket: list[Any] = []
    for index, parameter in enumerate(missing):
        bucket.append(parameter)
        is_full = sum(member.ds_numel for member in bucket) >= GATHER_ELEMENTS
        if is_full or index == len(missing) - 1:
            bucket[0].all_gather_coalesced(bucket).wait()
            bucket = []
    return missing


def hold(parameters: Iterable[Any]) -> None:
    """Make partitioned parameters whole until the next optimizer step, which releases everything.

    DeepSpeed releases a parameter when no module uses it any more, so it is told of one more. (Its own threshold for
    parameters to keep has no effect while it records or has lost its trace of a step, as pipeline stages do.)

    Communication: that of `gather`, when it is the first time since the last step.
    """
    held = list(parameters)
    gather(held)
    for parameter in held:
        parameter.ds_active_sub_modules.add(HOLDER)


def release(parameters: Iterable[Any]) -> None:
    """Free what `gather` made; every rank keeps its partition."""
    gathered = list(parameters)
    if gathered:
        gathered[0].partition(param_list=gathered, has_been_updated=False)


def deepspeed_config(settings: OptimizerSettings, groups: ProcessGroups) -> dict[str, Any]:
    """The one place where a DeepSpeed configuration is written."""
    stage = settings.zero_stage
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        # Micro-batches are accumulated by us: DeepSpeed would divide the gradient of every backward pass by this, and
        # on an earlier pipeline stage a gradient that the later ones have divided already.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.grad_clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "contiguous_gradients": True,
            # Stage 1 would then have to know in advance which backward pass is a step's last one; stage 2 was never
            # run with it.
            "overlap_comm": stage == 3 and groups.device.type == "cuda",
            "reduce_bucket_size": REDUCE_ELEMENTS,
        },
    }
    if stage == 3:
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
        config["bf16"] = {"enabled": True}
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
