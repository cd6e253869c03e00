"""The training engine at ZeRO stages 1 to 3.

There is one DeepSpeed engine over the data-parallel ranks that hold the same slice of the same stage.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ebft_mega.parallel.deepspeed_adapter.deepspeed_setup import deepspeed_config, import_deepspeed
from ebft_mega.parallel.deepspeed_adapter.optimizer_storage import OptimizerStorage
from ebft_mega.parallel.deepspeed_adapter.partitioned_parameters import (
    gather,
    hold,
    partitioned_module,
    release,
    view_of,
    whole_shape,
)
from ebft_mega.parallel.deepspeed_adapter.replica_ranks import (
    MegatronUnit,
    check_equal_sub_groups,
    check_traces_within,
    mark_counted,
)
from ebft_mega.parallel.engine import ZeroEngine
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.parallel.optimizer import (
    LookAtGradient,
    OptimizerSettings,
    SlicedOptimizer,
    Update,
    has_finite_squares,
    parameter_groups,
    sum_over,
)
from ebft_mega.parallel.optimizer_state import StateKind
from ebft_mega.parallel.roles import ParameterRole
from ebft_mega.parallel.stage_module import Loader, StageRunner, StageT, replicated_module, runner

# Stage 1 in bfloat16 reduces its groups' gradients together until there are this many, and copies them for it; a group
# alone lies end to end and is not copied.
ALLREDUCE_ELEMENTS = 0


class DeepSpeedEngine(ZeroEngine[StageT]):
    """A stage whose optimizer state (stages 1 to 3), gradients (2, 3) and parameters (3) are partitioned."""

    def __init__(
        self,
        build_stage: Callable[[], StageT],
        load: Loader[StageT],
        roles: Callable[[StageT], Mapping[str, ParameterRole]],
        settings: OptimizerSettings,
        groups: ProcessGroups,
    ) -> None:
        """Arguments as of `make_engine`."""
        deepspeed = import_deepspeed(groups)
        config = deepspeed_config(settings, groups)
        if settings.zero_stage == 3:
            module = partitioned_module(build_stage, load, config, groups)
            check_traces_within(groups)
        else:
            module = replicated_module(build_stage, load, groups)
        super().__init__(module, roles, settings, groups)
        mark_counted(module, self._shared)
        # Ours: DeepSpeed's own would compile a C++ extension at start-up (minutes on a CPU).
        decayed = parameter_groups(module, self.parameter_shapes(), settings.weight_decay)
        self._optimizer = SlicedOptimizer(decayed, settings)
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=self._optimizer, config=config, mpu=MegatronUnit(groups)
        )
        self._storage = OptimizerStorage(self._engine.optimizer, settings, groups)
        check_equal_sub_groups(len(self._storage.sub_groups()), groups)
        reduce = self._engine.allreduce_gradients
        self._engine.allreduce_gradients = lambda: reduce(bucket_size=ALLREDUCE_ELEMENTS)
        self._reduced_step = self._engine.optimizer.step
        # The moment between the reduction of gradients and their norm is inside the engine's step.
        self._engine.optimizer.step = self._step_of_reduced_gradients
        self._look: LookAtGradient | None = None  # of the step that is under way
        self._updates = True  # whether it does
        self._clips_squares = settings.clips_squares
        self._hold_parameters = settings.hold_parameters if settings.zero_stage == 3 else "anyway"
        self._view = view_of(module, build_stage) if settings.zero_stage == 3 else module

    def forward(self, compute: Callable[[StageT], Any]) -> Any:
        """Call DeepSpeed's engine, whose hooks gather parameters; with `hold_parameters` step all are whole before."""
        if self._hold_parameters == "step":
            hold(self.module.parameters())
        return self._engine(compute)

    def backward(self, loss: Tensor) -> None:
        """Run DeepSpeed's backward pass, undoing its average over the data-parallel ranks."""
        self._begin_backward()
        # DeepSpeed averages gradients over the data-parallel ranks; earlier stages inherit the factor.
        self._engine.backward(loss * self._groups.data_parallel_size)

    def backward_from(self, output: Tensor, gradient: Tensor) -> None:
        """Run torch's backward pass: DeepSpeed's takes a scalar loss only, but its hooks see this one."""
        self._begin_backward()
        output.backward(gradient)

    def step(self, learning_rate: float, look: LookAtGradient | None = None) -> Update:
        """Run DeepSpeed's step, with sums over the replica between its reduction of gradients and its norm."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._look = look
        self._engine.step()
        self._require_faultless(self._optimizer)
        self._storage.forget_gradients()
        applied = bool(self._engine.was_step_applied())
        return Update(float(self._engine.get_global_grad_norm()) if applied else float("inf"), applied)

    def drop_gradient(self, look: LookAtGradient) -> None:
        """Run a step of DeepSpeed's that skips the update, as it skips one with a gradient that is not finite."""
        self._look, self._updates = look, False
        self._engine.step()
        self._updates = True
        self._storage.forget_gradients()
        assert not self._engine.was_step_applied(), "a gradient of NaN is never applied"

    @contextmanager
    def whole_parameters(self, recording: bool = False) -> Iterator[StageRunner]:
        """Gather all parameters at once, for a view of the stage without engine hooks.

        With the hooks, every decode pass would gather every layer again and release what was gathered here. Layer by
        layer (`hold_parameters` none) it has to be the hooks, which find a tied head's weight too, but only inside of
        the engine's forward.
        """
        assert not recording or self._hold_parameters in ("step", "anyway"), (
            "parameters that are released have no values for the backward pass"
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
    def _run_by_layer(self, compute: Callable[[StageT], Any]) -> Any:
        return self._engine(compute)

    def shape_of(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Shape that DeepSpeed remembers of a partitioned parameter, which itself looks empty."""
        return whole_shape(parameter)

    def state_tensors(self, kind: StateKind) -> Iterator[tuple[str, Tensor]]:
        """Name and whole state of each parameter, put together from the ranks' partitions: a new tensor each."""
        for name, parameter in self.module.named_parameters():
            yield name, self._storage.whole_state(kind, parameter)

    @property
    def applied_updates(self) -> int:
        """The optimizer's own count."""
        return self._storage.applied_updates

    def prepare_moments(self, applied_updates: int) -> None:
        """Make the optimizer's state where there is none yet, and set its count.

        Without it a fresh engine has nothing to put moments into (KeyError).
        """
        self._storage.prepare_moments(applied_updates)

    def set_state(self, kind: StateKind, parameter: nn.Parameter, value: Tensor) -> None:
        """Overwrite this rank's partition of a parameter's master weight or moment."""
        self._storage.set_state(kind, parameter, value)

    def _begin_backward(self) -> None:
        """Tell the optimizer that a new micro-batch's gradients come.

        It learns it from forward passes. Where backward passes follow each other, stage 3 would take the second for a
        part of the first and overwrite its gradients; and on all but the last pipeline stage gradients of the second
        would never be reduced.
        """
        self._engine.optimizer.clear_backward_seen_flag()

    def _step_of_reduced_gradients(self) -> None:
        self._sum_partial_gradients()
        self._sum_tied_gradients()
        if self._look is not None:
            look, self._look = self._look, None
            look(self._storage.shown_gradients(self.module))
        if not self._updates:
            self._spoil_gradients()
        self._spread_non_finite()
        self._reduced_step()

    def _sum_partial_gradients(self) -> None:
        """Add up gradients of which every tensor-parallel rank has a share; DeepSpeed knows none of those ranks.

        Without it each rank would step with its own share, and the replicas drift apart.
        """
        sum_over(self._groups.tensor_parallel, self._storage.gradients(self._shared.partial))

    def _sum_tied_gradients(self) -> None:
        """Add up the gradients of a weight that is on both ends of the pipeline."""
        from deepspeed.utils import safe_get_full_grad, safe_set_full_grad

        if self._storage.has_aligned_gradients:
            sum_over(self._groups.embedding, self._storage.gradients(self._shared.tied))
            return
        # Stages 1 and 2 cut a stage's parameters end to end, so both ends of the pipeline cut this one differently.
        for parameter in self._shared.tied:
            whole = safe_get_full_grad(parameter)
            sum_over(self._groups.embedding, [whole])
            safe_set_full_grad(parameter, whole)

    def _spread_non_finite(self) -> None:
        """Let all ranks skip a step that DeepSpeed alone would not have all of them skip.

        A gradient is not finite in a parameter that no norm counts, or it is not clipped and its square is not finite.
        """
        if self._clips_squares and dist.get_world_size(self._groups.model_parallel) == 1:
            return
        bad = torch.zeros((), device=self._groups.device)
        for gradient in self._storage.gradients(self._shared.uncounted):
            bad += ~gradient.isfinite().all()
        for gradient in self._storage.gradients(() if self._clips_squares else self._storage.parameters):
            bad += ~has_finite_squares(gradient)
        dist.all_reduce(bad, group=self._groups.data_parallel)
        dist.all_reduce(bad, group=self._groups.model_parallel)
        if bad > 0:
            self._spoil_gradients()

    def _spoil_gradients(self) -> None:
        """Make this rank's part of the gradient one with which a step is skipped."""
        for gradient in self._storage.gradients(self._storage.parameters):
            gradient.fill_(torch.nan)
