"""Optimizer state read out of an engine and restored is equal bit for bit, at every ZeRO stage and precision."""

import math
from functools import cache
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ebft_mega.parallel.groups import ProcessGroups, connect, make_process_groups
from ebft_mega.parallel.optimizer_state import share_out
from ebft_mega.parallel.zero import OptimizerSettings, ZeroEngine, make_engine
from tests.distributed.parallel.test_zero import poison
from tests.distributed.parallel.zero_stages import (
    HIDDEN,
    LEARNING_RATE,
    LENGTH,
    TinyStage,
    accumulate,
    rows,
    settings,
    tiny_engine,
)
from tests.distributed.ranks import run_ranks
from tests.distributed.traffic import PhaseNames, Traffic

STAGES, DTYPES = (0, 1, 2, 3), (torch.float32, torch.bfloat16)
# Ranks, tensor, pipeline. Four ranks do not divide every parameter evenly, and the smallest has two elements.
LAYOUTS = {"data": (2, 1, 1)}
MANY = {"more data": (4, 1, 1), "tensor": (2, 2, 1), "pipeline": (2, 1, 2), "data x tensor x pipeline": (8, 2, 2)}
State = dict[str, dict[str, Tensor]]  # by kind and parameter

every_layout = pytest.mark.parametrize(
    "layout", [pytest.param(layout, marks=pytest.mark.slow) for layout in (*LAYOUTS, *MANY)]
)


def state_of(engine: ZeroEngine) -> State:
    return {kind: {name: value.clone() for name, value in engine.state_tensors(kind)} for kind in engine.state_kinds}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Bit for bit: also the sign of a zero."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return left.keys() == right.keys() and all(
        torch.equal(value.view(integers[value.element_size()]), right[name].view(integers[value.element_size()]))
        for name, value in left.items()
    )


def same_state(left: State, right: State) -> bool:
    return left.keys() == right.keys() and all(same(left[kind], right[kind]) for kind in left)


def computed_with(engine: ZeroEngine) -> dict[str, Tensor]:
    """The parameters that passes see."""
    with engine.whole_parameters() as run:
        return run(lambda stage: {name: value.detach().clone() for name, value in stage.named_parameters()})


def output_of(engine: ZeroEngine, groups: ProcessGroups) -> Tensor:
    """What the stage makes of a row."""
    dtype = next(engine.module.parameters()).dtype
    entering = torch.ones(1, LENGTH, HIDDEN, dtype=dtype)
    with engine.whole_parameters() as run:
        return run(lambda stage: stage.hidden(rows(9)[:1] if groups.is_first_stage else entering))


def train(engine: ZeroEngine, groups: ProcessGroups, steps: range, poisoned: tuple[int, ...] = ()) -> list[float]:
    norms = []
    for step in steps:
        handles = poison(engine, groups, "out_bias", float("nan")) if step in poisoned else []
        accumulate(engine, groups, step)
        for handle in handles:
            handle.remove()
        update = engine.step(LEARNING_RATE)
        assert update.applied == (step not in poisoned)
        norms.append(update.grad_norm)
    return norms


def restored(groups: ProcessGroups, options: OptimizerSettings, state: State, applied_updates: int) -> ZeroEngine:
    """A new engine that resumes from a state; every value of it is read by one data-parallel rank."""
    asked = []

    def read(kind, name):
        asked.append((kind, name))
        return state[kind][name]

    def fill_from_state(stage, gathered, is_reader):
        for name, parameter in stage.named_parameters():
            with gathered(parameter):
                if is_reader:
                    parameter.data.copy_(state["weights"][name])

    engine = make_engine(lambda: TinyStage(groups, options.dtype), fill_from_state, TinyStage.roles, options, groups)
    engine.restore(read, applied_updates)
    by_rank = [None] * groups.data_parallel_size
    dist.all_gather_object(by_rank, asked, group=groups.data_parallel)
    everything = [(kind, name) for kind in state for name in state[kind]]
    assert sorted(sum(by_rank, [])) == sorted(everything)
    sizes = [sum(state[kind][name].numel() for kind, name in of_rank) for of_rank in by_rank]
    assert max(sizes) <= sum(sizes) / len(sizes) + max(value.numel() for value in state["weights"].values())
    return engine


def stop_and_resume(groups: ProcessGroups, options: OptimizerSettings) -> tuple[State, dict[str, bool]]:
    """State after three steps of which one was skipped, and how resuming from it compares with not stopping."""
    engine = tiny_engine(groups, options)
    assert engine.applied_updates == 0
    checks = {
        "moments are zero before": not any(v.any() for k in options.rule.moments for v in state_of(engine)[k].values())
    }
    train(engine, groups, range(3), poisoned=(1,))
    checks["skipped steps do not count"] = engine.applied_updates == 2
    state = state_of(engine)
    checks["moments are not zero"] = all(value.any() for kind in state for value in state[kind].values())
    twin = restored(groups, options, state, engine.applied_updates)
    checks["state is what was read"] = same_state(state_of(twin), state)
    checks["same parameters"] = same(computed_with(twin), computed_with(engine))
    checks["same forward pass"] = torch.equal(output_of(twin, groups), output_of(engine, groups))
    expected, found = train(engine, groups, range(3, 6)), train(twin, groups, range(3, 6))
    checks["same norms"] = found == expected
    checks["same state"] = same_state(state_of(twin), state_of(engine)) and twin.applied_updates == 5
    checks["same parameters in the end"] = same(computed_with(twin), computed_with(engine))
    return state, checks


def move_between_stages(groups: ProcessGroups, states: dict[int, State], dtype: torch.dtype) -> dict[str, bool]:
    """A stage's state in an engine of another, with zeros of both signs and the smallest numbers."""
    checks = {}
    moves = product(STAGES, STAGES) if groups.data_parallel_size > 2 else ((0, 3), (3, 1), (1, 2), (2, 0))
    for old, new in moves:
        state = {kind: {name: value.clone() for name, value in states[old][kind].items()} for kind in states[old]}
        for value in state["exp_avg"].values():
            value.view(-1)[0], value.view(-1)[-1] = -0.0, -1e-45
        engine = restored(groups, settings(new, dtype), state, 7)
        checks[f"{old} to {new}"] = same_state(state_of(engine), state) and engine.applied_updates == 7
    return checks


def check_all(tensor: int, pipeline: int) -> dict[str, dict[str, bool]]:
    groups = make_process_groups(connect(), tensor, pipeline)
    found = {}
    for dtype in DTYPES:
        states = {}
        for stage in STAGES:
            states[stage], found[f"zero {stage} {dtype}"] = stop_and_resume(groups, settings(stage, dtype))
        if groups.data_parallel_size > 1:
            found[f"moves {dtype}"] = move_between_stages(groups, states, dtype)
    return found


@cache
def checks_of(layout: str) -> list[dict[str, dict[str, bool]]]:
    return run_ranks((LAYOUTS | MANY)[layout][0], check_all, *(LAYOUTS | MANY)[layout][1:])


@every_layout
def test_resuming_from_a_restored_state_is_not_having_stopped(layout):
    for rank, found in enumerate(checks_of(layout)):
        for case, checks in found.items():
            assert all(checks.values()), (rank, case, [name for name, passed in checks.items() if not passed])


def traps() -> dict[str, object]:
    """What DeepSpeed's own functions do with the state of a stage, on this rank."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    groups = make_process_groups(connect())
    found: dict[str, object] = {}
    for stage in (2, 3):
        engine = tiny_engine(groups, settings(stage))
        parameters = dict(engine.module.named_parameters())
        matrix, scale = parameters["embedding.weight"], parameters["blocks.0.head_scale"]
        whole = torch.full((2,), -0.0)
        found[f"fresh {stage}"] = failure(lambda: engine.set_state("exp_avg", matrix, torch.zeros(11, 6)))  # noqa: B023
        found[f"whole value {stage}"] = failure(lambda: safe_set_full_fp32_param(scale, whole))  # noqa: B023
        train(engine, groups, range(1))
        if stage == 2:
            links = [p._hp_mapping for p in parameters.values() if p.ndim == 1 and p._hp_mapping is not None]
            found["links"] = [failure(lambda: link.get_hp_fragment("exp_avg")) for link in links]  # noqa: B023
        engine.restore(lambda kind, name: torch.full(engine.parameter_shapes()[name], -0.0), 1)  # noqa: B023
        found[f"sign {stage}"] = bool(safe_get_full_fp32_param(matrix).signbit().all())
        found[f"own sign {stage}"] = all(value.signbit().all() for value in state_of(engine)["exp_avg"].values())
    return found


def failure(function) -> str:
    try:
        function()
    except (LookupError, RuntimeError, ValueError) as error:
        return type(error).__name__
    return ""


def test_traps_of_deepspeeds_own_functions():
    """Why `prepare_moments`, `set_partition`, `_fragment` and `whole_of_fragments` are there."""
    by_rank = run_ranks(4, traps)
    assert [found["fresh 3"] for found in by_rank] == ["KeyError"] * 4
    assert "KeyError" in [found["fresh 2"] for found in by_rank]
    # Two elements over four ranks: the last two have nothing but padding.
    assert [bool(found["whole value 3"]) for found in by_rank] == [False, False, True, True]
    assert [found["whole value 2"] for found in by_rank] == [""] * 4
    links = [error for found in by_rank for error in found["links"]]
    assert links and set(links) == {"ValueError"}
    assert not any(found["sign 2"] for found in by_rank)
    assert all(found["own sign 2"] and found["own sign 3"] for found in by_rank)


def count_bytes() -> dict[str, tuple[dict, int, int]]:
    """What reading and restoring the state says to other ranks; elements of the stage, without and with padding."""
    groups = make_process_groups(connect())
    found = {}
    for stage in STAGES:
        engine = tiny_engine(groups, settings(stage))
        phases = PhaseNames()
        shapes = engine.parameter_shapes().values()
        ranks = groups.data_parallel_size
        with Traffic(groups, phases) as traffic:
            with phases.phase("fresh"):
                for kind in engine.state_kinds[1:]:
                    for _ in engine.state_tensors(kind):
                        pass
        train(engine, groups, range(1))
        with traffic:
            with phases.phase("read"):
                state = state_of(engine)
            with phases.phase("restore"):
                engine.restore(lambda kind, name, state=state: state[kind][name], 1)
        elements = sum(map(math.prod, shapes))
        padded = sum(-(-math.prod(shape) // ranks) * ranks for shape in shapes)
        found[stage] = dict(traffic.bytes), elements, padded
    return found


def test_bytes_of_reading_and_restoring_follow_the_docstrings():
    for found in run_ranks(4, count_bytes):
        for stage, (sent, elements, padded) in found.items():
            expected = {("restore", "data_parallel", "broadcast"): 3 * 4 * elements}
            if stage in (1, 2):
                expected["read", "data_parallel", "all-reduce"] = 3 * 4 * elements
            if stage == 3:
                assert padded > elements
                expected["read", "data_parallel", "all-gather"] = 3 * 4 * padded
            assert sent == expected, stage


def test_sharing_out_is_fair_and_complete():
    sizes = [7, 1, 1, 9, 0, 4, 4, 100, 3]
    for ranks in (1, 2, 3, 16):
        owners = share_out(sizes, ranks)
        loads = [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank) for rank in range(ranks)]
        assert len(owners) == len(sizes) and sum(loads) == sum(sizes)
        assert max(loads) <= sum(sizes) / ranks + max(sizes)
    assert share_out([1] * 8, 4) == [0, 1, 2, 3] * 2
