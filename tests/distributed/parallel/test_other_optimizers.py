"""Optimizers with no moment and with one, at every ZeRO stage; their checkpoints; one that breaks on a rank alone."""

from collections.abc import Iterable
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch

from ebft_mega.errors import EntryError
from ebft_mega.parallel.groups import connect, make_process_groups
from tests.distributed.checkpoint.test_checkpoint_state import MODELS, made_up_state, pass_on, whole_tensors
from tests.distributed.parallel.test_engine_state import same_state, stop_and_resume, train
from tests.distributed.parallel.zero_stages import accumulate, farthest, plain_steps, settings, tiny_engine
from tests.distributed.ranks import run_ranks
from tests.distributed.steps import Layout
from tests.other_optimizers import Broken, Momentum, Sgd

STAGES, STEPS, CLIP = (0, 1, 2, 3), 3, 0.5
RULES = {"sgd": Sgd, "momentum": Momentum}
QUICK = {
    Layout(2, 1, 1): (("momentum", 0), ("momentum", 1), ("momentum", 2), ("sgd", 2), ("momentum", 3), ("sgd", 3)),
    Layout(1, 2, 1): (("sgd", 0), ("momentum", 3)),
}
WITHOUT_RESUME = (("momentum", 0), ("sgd", 0), ("sgd", 2))  # to save time; bfloat16 has them all
BROKEN = {
    "not finite": "momentum, with velocity that are not finite after an update; expected finite numbers, as the",
    "elsewhere": "momentum, with weights of torch.float32 and shape [",
    "dtype": "momentum, with velocity of torch.float64 and shape [",
    "raises": "momentum, with an update that raises IndexError: too far in line ",
}
CHAINS = {
    "two ranks": (Layout(2, 1, 1), Layout(1, 2, 1, zero_stage=0), Layout(2, 1, 1, zero_stage=1), Layout(1, 1, 2)),
    "four ranks": (Layout(2, 2, 1), Layout(4, 1, 1, zero_stage=2), Layout(1, 2, 2, zero_stage=0), Layout(2, 1, 2)),
}


def steps_at(layout: Layout, cases: Iterable[tuple[str, int]], dtype: torch.dtype = torch.float32) -> dict[str, object]:
    """How far steps are from those of the whole model, and what stopping and resuming changes, by case."""
    groups = make_process_groups(connect(), layout.tensor, layout.pipeline)
    found: dict[str, object] = {}
    for name, stage in cases:
        rule = RULES[name]
        options = settings(stage, dtype, CLIP, rule=rule())
        engine = tiny_engine(groups, options)
        norms = train(engine, groups, range(STEPS))
        truth = plain_steps(groups, STEPS, CLIP, rule=rule())
        case = f"{layout} {name} {stage} {dtype}"
        if dtype == torch.float32:
            found[f"{case}: norms"] = norms == pytest.approx(truth.norms, rel=1e-5)
            found[f"{case}: weights"] = farthest(engine, groups, truth) < 2e-6
        if (name, stage) not in WITHOUT_RESUME or dtype != torch.float32:
            _, checks = stop_and_resume(groups, options)
            found |= {f"{case}: {check}": passed for check, passed in checks.items()}
    return found


def faults(stages: tuple[int, ...]) -> dict[str, str]:
    """The errors of optimizers that break on the last rank alone."""
    groups = make_process_groups(connect())
    found = {}
    for fault, stage in zip(BROKEN, stages, strict=True):
        engine = tiny_engine(groups, settings(stage, rule=Broken(fault)))
        accumulate(engine, groups, 0)
        with pytest.raises(EntryError) as caught:
            engine.step(0.1)
        found[fault] = str(caught.value)
    return found


def quick(source: str) -> tuple[dict[str, object], dict[str, str]]:
    found: dict[str, object] = {}
    for layout, cases in QUICK.items():
        found |= steps_at(layout, cases)
    errors = faults(STAGES)
    pass_on(source, CHAINS["two ranks"], (torch.float32,) * 4, "llama", rule=Momentum())
    return found, errors


def check_chain(source: Path, chain: str, moments: tuple[str, ...]) -> None:
    expected = whole_tensors(source)
    assert list(expected) == ["weights", *moments]
    for number in range(len(CHAINS[chain])):
        assert same_state(whole_tensors(Path(f"{source}-{number}")), expected), CHAINS[chain][number]


def test_no_moment_and_one_moment_at_every_stage_and_after_a_resume_elsewhere(tmp_path):
    source = tmp_path / "saved"
    made_up_state(source, MODELS["llama"], ("weights", "velocity"))
    by_rank = run_ranks(2, quick, str(source))
    for found, errors in by_rank:
        assert all(found.values()), [name for name, passed in found.items() if not passed]
        assert errors == by_rank[0][1]
    for fault, text in by_rank[0][1].items():
        place, _, rest = text.partition(": train.optimizer: found ")
        assert place.startswith("configuration: ") and "other_optimizers.py:" in place, text
        assert rest.startswith(BROKEN[fault]), text
    check_chain(source, "two ranks", Momentum.moments)


def every_case(layout: Layout, dtype: torch.dtype) -> dict[str, object]:
    return steps_at(layout, product(RULES, STAGES), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [Layout(2, 1, 1), Layout(1, 2, 1), Layout(2, 2, 1)], ids=str)
def test_the_same_at_every_stage(layout, dtype):
    for found in run_ranks(layout.world_size, every_case, layout, dtype):
        assert all(found.values()), [name for name, passed in found.items() if not passed]


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_the_same_checkpoints_at_four_ranks(name, tmp_path):
    rule, source, layouts = RULES[name], tmp_path / "saved", CHAINS["four ranks"]
    made_up_state(source, MODELS["qwen2"], ("weights", *rule.moments))
    dtypes = (torch.bfloat16, torch.float32) * 2
    run_ranks(4, partial(pass_on, rule=rule()), str(source), layouts, dtypes, "qwen2")
    check_chain(source, "four ranks", rule.moments)
