"""A run that was stopped and resumed equals the run that never stopped, bit for bit, at every layout."""

import json

import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.runs import Setting, assert_equal_tensors, checkpoint, lines, make_datasets, run

BFLOAT16 = ("train.dtype=bfloat16",)
SHORT, LONG = 6, 20  # steps; stopped in the middle
SETTINGS = (
    pytest.param(SHORT, Setting(2, 1, 1, BFLOAT16), marks=pytest.mark.slow),
    (SHORT, Setting(1, 1, 2, model_type="qwen3", tied=False)),
    *(
        pytest.param(LONG, setting, marks=pytest.mark.slow)
        for setting in (
            *(Setting(*degrees) for degrees in ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2))),
            *(Setting(*degrees, BFLOAT16) for degrees in ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2))),
            Setting(2, 2, 2, BFLOAT16, "qwen2", tied=False),
            Setting(2, 1, 1, model_type="mistral", tied=False),
            *(Setting(2, 1, 1, (f"zero.stage={stage}", *dtype)) for stage in (0, 1, 2) for dtype in ((), BFLOAT16)),
            Setting(2, 1, 1, ("ebft.rl_coef=0", "ebft.ce_coef=1")),
            Setting(2, 1, 1, ("data.document_masking=true",)),
        )
    ),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Where runs find their data and leave what they do."""
    directory = tmp_path_factory.mktemp("resume")
    make_datasets(directory)
    return directory


@pytest.mark.parametrize(("steps", "setting"), SETTINGS, ids=str)
def test_resumed_run_is_the_run_that_never_stopped(root, steps, setting):
    name, half = f"whole-{steps}-{setting}-{setting.tied}", steps // 2
    every = ("train.lr_scheduler=cosine", f"train.max_steps={steps}", f"checkpoint.interval={half}")
    assert run_ranks(setting.ranks, run, str(root), name, setting, every) == [0] * setting.ranks
    resume = f"checkpoint.resume={checkpoint(root / name, half)}"
    assert run_ranks(setting.ranks, run, str(root), f"{name}-resumed", setting, (*every, resume)) == [0] * setting.ranks
    whole, resumed = lines(root / name), lines(root / f"{name}-resumed")
    assert [line["step"] for line in whole] == list(range(steps + 1))
    assert resumed[-half:] == whole[-half:]
    # In a new directory the evaluations so far come first.
    assert [line["step"] for line in resumed[:-half]] == [step for step in range(half + 1) if step % 4 == 0]
    assert all(line.items() <= whole[line["step"]].items() for line in resumed[:-half])
    assert_equal_tensors(checkpoint(root / name, steps), checkpoint(root / f"{name}-resumed", steps))


CHAIN = (Setting(2, 2, 2), Setting(1, 1, 1, ("zero.stage=0",)), Setting(2, 1, 2, ("zero.stage=1",)), Setting(1, 2, 1))


@pytest.mark.parametrize(
    "chain",
    [(Setting(2, 1, 1, ("zero.stage=1",)), Setting(1, 2, 1)), pytest.param(CHAIN, marks=pytest.mark.slow)],
    ids=lambda chain: "->".join(f"{s.data}{s.tensor}{s.pipeline}" for s in chain),
)
def test_layout_may_change_at_every_resume(root, chain):
    """Losses as in one uninterrupted run; the ZeRO stage changes, too."""
    part, name = 4, "chain-" + "-".join(map(str, chain))
    steps = f"train.max_steps={part * len(chain)}"
    whole = chain[0]
    assert run_ranks(whole.ranks, run, str(root), f"{name}-whole", whole, (steps,)) == [0] * whole.ranks
    for index, setting in enumerate(chain):
        until = (f"train.max_steps={part * (index + 1)}", f"checkpoint.interval={part}")
        assert run_ranks(setting.ranks, run, str(root), name, setting, until) == [0] * setting.ranks
    expected, found = lines(root / f"{name}-whole"), lines(root / name)
    assert [line["step"] for line in found] == [line["step"] for line in expected] == list(range(len(found)))
    for before, after in zip(expected, found, strict=True):
        for key in ("train/loss", "ebft/ce_loss", "ebft/mean_reward", "eval/ce_loss"):
            if key in before:
                assert after[key] == pytest.approx(before[key], rel=1e-5, abs=1e-6), (before["step"], key)
    state = json.loads((checkpoint(root / name, part * len(chain)) / "state.json").read_text())
    last = chain[-1]
    assert state["layout"]["tensor_parallel"] == last.tensor and state["step"] == part * len(chain)
