"""A checkpoint that an earlier version of this program wrote is resumed as that version would have resumed it."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from ebft_mega.apps.report.run_report import write_run_report
from ebft_mega.checkpoint.commit import CHECKPOINTS
from ebft_mega.config.load import load_config
from ebft_mega.lifecycle.run import run_training
from ebft_mega.parallel.groups import connect
from ebft_mega.planning.run_plan import check_run
from ebft_mega.runtime.stop_requests import Signals
from tests.distributed.ranks import run_ranks

# The checkpoint of step 4, its data and the metrics of all 8 steps, as the version named by the folder wrote them on
# one rank. `config.yaml` there is that run's configuration.
OLD = Path(__file__).parents[2] / "fixtures" / "checkpoint_5f04e0b"
SAVED_STEP = 4


def resume(directory: str, tensor: int, pipeline: int) -> int:
    """Take the steps that are left, in every rank."""
    connect()
    overrides = (
        f"output_dir={directory}/run",
        f"data.shards={OLD / 'train'}",
        f"evaluation.shards={OLD / 'held_out'}",
        f"data.cache={directory}/cache",
        f"parallel.tensor_parallel_size={tensor}",
        f"parallel.pipeline_parallel_size={pipeline}",
    )
    config = load_config(OLD / "config.yaml", overrides)
    plan = check_run(config, dist.get_world_size())
    return run_training(config, plan, None, Signals(), time.monotonic(), write_run_report)


def logged(path: Path) -> dict[int, dict[str, float]]:
    """Metrics by step."""
    return {line["step"]: line for line in map(json.loads, path.read_text().splitlines())}


@pytest.mark.parametrize(
    ("data", "tensor", "pipeline"),
    [
        (1, 1, 1),
        pytest.param(2, 1, 1, marks=pytest.mark.slow),
        pytest.param(1, 2, 1, marks=pytest.mark.slow),
        pytest.param(1, 1, 2, marks=pytest.mark.slow),
    ],
)
def test_the_losses_of_the_steps_that_are_left_are_the_same(tmp_path, data, tensor, pipeline):
    name = f"step-{SAVED_STEP:08d}"
    shutil.copytree(OLD / name, tmp_path / "run" / CHECKPOINTS / name)
    codes = run_ranks(data * tensor * pipeline, resume, str(tmp_path), tensor, pipeline)
    assert set(codes) == {0}
    expected, found = logged(OLD / "metrics.jsonl"), logged(tmp_path / "run" / "metrics.jsonl")
    steps = range(SAVED_STEP + 1, 9)
    assert [step for step in found if step > SAVED_STEP] == list(steps)
    for step in steps:
        assert found[step].keys() >= expected[step].keys()
        for key in ("train/loss", "ebft/rl_loss", "ebft/ce_loss", "ebft/cfm_loss", "ebft/alignment", "train/grad_norm"):
            assert found[step][key] == pytest.approx(expected[step][key], rel=1e-5, abs=1e-5), (step, key)
    assert found[8]["eval/ce_loss"] == pytest.approx(expected[8]["eval/ce_loss"], abs=1e-5)
