"""What each workaround of the ZeRO engine is for: the trap without it, and the right result with it."""

import pytest
import torch
from torch import nn

from ebft_mega.parallel.groups import ProcessGroups, connect, make_process_groups
from ebft_mega.parallel.zero import OptimizerSettings, ZeroEngine
from tests.distributed.ranks import run_ranks

SIZE = 8


class TwoBranches(nn.Module):
    """Two matrices, of which a micro-batch may use one."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(SIZE, SIZE, bias=True)
        self.second = nn.Linear(SIZE, SIZE, bias=True)

    def forward(self, compute):
        return compute(self)


def fill(module, gathered, is_reader):
    """Values that no low precision can hold."""
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            with gathered(parameter):
                if is_reader:
                    generator = torch.Generator().manual_seed(index)
                    parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 3)


def make_engine(groups: ProcessGroups, dtype: torch.dtype = torch.float32) -> ZeroEngine:
    settings = OptimizerSettings((0.9, 0.95), 0.0, 0.0, dtype, micro_batch_size=1)
    return ZeroEngine(TwoBranches, fill, settings, groups)


def use(engine: ZeroEngine, *branches: str) -> None:
    """One micro-batch: forward and backward through some branches."""
    x = torch.ones(2, SIZE)

    def compute(module):
        return sum(getattr(module, branch)(x).square().sum() for branch in branches)

    engine.backward(engine.forward(compute) / (len(branches) * engine._groups.data_parallel_size))


def two_steps(engine: ZeroEngine, step) -> float:
    """Gradient norm of a second step whose first micro-batch leaves one branch out; learning rate 0."""
    use(engine, "first", "second")
    use(engine, "first", "second")
    step()
    use(engine, "first")
    use(engine, "second")
    step()
    return float(engine._engine.get_global_grad_norm())


def check_stale_gradients() -> dict[str, float]:
    groups = make_process_groups(connect())
    plain = make_engine(groups)
    for group in plain._engine.optimizer.param_groups:
        group["lr"] = 0.0
    without = two_steps(plain, plain._engine.step)
    engine = make_engine(groups)
    with_workaround = two_steps(engine, lambda: engine.step(0.0))
    fresh = make_engine(groups)
    use(fresh, "first")
    use(fresh, "second")
    fresh.step(0.0)
    return {
        "without": without,
        "with": with_workaround,
        "truth": float(fresh._engine.get_global_grad_norm()),
    }


def test_a_parameter_left_out_of_the_first_micro_batch_keeps_no_old_gradient():
    for result in run_ranks(2, check_stale_gradients):
        assert result["with"] == pytest.approx(result["truth"], rel=1e-5)
        # The trap itself: when this fails, DeepSpeed clears its buffer and the workaround can go.
        assert result["without"] > 1.5 * result["truth"]


def check_precision() -> dict[str, bool]:
    import deepspeed

    groups = make_process_groups(connect())
    expected = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)) / 3
    engine = make_engine(groups)
    with engine.whole_parameters() as view:
        exact = torch.equal(view.first.weight, expected)
    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 2}, dtype=torch.float32):
        trapped = nn.Linear(SIZE, SIZE)
    half = make_engine(groups, torch.bfloat16)
    master = dict(half.full_parameters())["first.weight"]
    return {
        "exact": exact,
        "dtype argument is obeyed": trapped.weight.ds_tensor.dtype == torch.float32,
        "gradients in float32": half._engine.optimizer.gradient_accumulation_dtype == torch.float32,
        "masters in float32": master.dtype == torch.float32,
    }


def test_precision_is_what_was_asked_for():
    for result in run_ranks(2, check_precision):
        assert result["exact"] and result["gradients in float32"] and result["masters in float32"]
        # The trap itself: when this fails, `zero.Init` honours its dtype argument again.
        assert not result["dtype argument is obeyed"]


def check_non_finite() -> dict[str, object]:
    groups = make_process_groups(connect())
    engine = make_engine(groups)
    before = {name: value.clone() for name, value in engine.full_parameters()}
    poison = float("nan") if groups.data_parallel_rank == 1 else 1.0
    engine.backward(engine.forward(lambda module: module.first(torch.ones(1, SIZE)).sum() * poison))
    skipped = engine.step(0.1)
    unchanged = all(torch.equal(before[name], value) for name, value in engine.full_parameters())
    use(engine, "first", "second")
    healthy = engine.step(0.1)
    changed = any(not torch.equal(before[name], value) for name, value in engine.full_parameters())
    finite = all(bool(value.isfinite().all()) for _, value in engine.full_parameters())
    return {
        "skipped": skipped,
        "unchanged": unchanged,
        "healthy": healthy,
        "changed": changed,
        "finite": finite,
    }


def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all():
    for result in run_ranks(2, check_non_finite):
        assert not result["skipped"].applied and result["skipped"].grad_norm == float("inf")
        assert result["unchanged"]
        assert result["healthy"].applied and result["changed"] and result["finite"]


def check_view_is_released() -> dict[str, object]:
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    groups = make_process_groups(connect())
    engine = make_engine(groups)
    with engine.whole_parameters() as view:
        shapes = [tuple(parameter.shape) for parameter in view.parameters()]
        output = view.first(torch.ones(1, SIZE)).detach().clone()
    status = {parameter.ds_status for parameter in engine.module.parameters()}
    try:
        with engine.whole_parameters() as view:
            raise ValueError("a rollout failed")
    except ValueError:
        pass
    return {
        "shapes": shapes,
        "sizes after": [parameter.numel() for parameter in view.parameters()],
        "partitioned again": status == {ZeroParamStatus.NOT_AVAILABLE},
        "hooks": len(view.first._forward_pre_hooks) + len(view.first._forward_hooks),
        "output": output,
    }


def test_the_view_holds_whole_parameters_only_while_it_is_open():
    first, second = run_ranks(2, check_view_is_released)
    assert first["shapes"] == [(SIZE, SIZE), (SIZE,), (SIZE, SIZE), (SIZE,)]
    assert first["sizes after"] == [0, 0, 0, 0]
    assert first["partitioned again"] and first["hooks"] == 0
    assert torch.equal(first["output"], second["output"])
