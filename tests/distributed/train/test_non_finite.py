"""Too many steps in a row that are not finite end the run; a step in which nothing counts is finite.

What makes a step one that is not finite: `test_planted_values.py`.
"""

import dataclasses
import json
import math
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.data.rows.loader import LoadedBatch
from ebft_mega.errors import NonFiniteStepError
from ebft_mega.lifecycle.build import build_trainer
from ebft_mega.parallel.groups import connect, make_process_groups
from ebft_mega.runtime.stop_requests import StopReason
from ebft_mega.train import gradient_pass, loop
from ebft_mega.train import non_finite as faults
from ebft_mega.train.hooks import step_hooks
from ebft_mega.train.observer import Observer
from ebft_mega.train.progress import Progress
from ebft_mega.train.step import train_step
from ebft_mega.train.step_metrics import step_metrics
from tests.distributed.ranks import run_ranks
from tests.distributed.steps import GLOBAL_BATCH, LEARNING_RATE, Case, config_of, rows_of_step

POISONED_RANK = 1  # the last stage of a pipeline of two
LAYOUTS = {"data": (1, 1), "tensor": (2, 1), "pipeline": (1, 2)}
NUM_SKIPS_BEFORE_THE_END = 3
FIRST_ROW = 100  # of the run that is trained, as after a resume


def build(directory, tensor, pipeline, *overrides):
    """A trainer of two ranks."""
    groups = make_process_groups(connect(), tensor, pipeline)
    degrees = (f"parallel.tensor_parallel_size={tensor}", f"parallel.pipeline_parallel_size={pipeline}")
    config = config_of(Case("faults", (*degrees, *overrides)), directory)
    architecture = Architecture.from_hf(config.model.config, "test")
    return build_trainer(config, architecture, architecture, groups)


@contextmanager
def nan_loss():
    """The loss is NaN on one rank."""
    original = gradient_pass.loss_terms

    def spoiled(*arguments):
        terms = original(*arguments)
        return dataclasses.replace(terms, total=terms.total * torch.nan)

    if dist.get_rank() == POISONED_RANK:
        gradient_pass.loss_terms = spoiled
    try:
        yield
    finally:
        gradient_pass.loss_terms = original


def weights_of(trainer):
    """This rank's master weights, end to end."""
    parameters = trainer.engine.local_parameters()
    return torch.cat([parameter.detach().flatten().clone() for _, parameter in parameters])


def take_a_step_of_filler(directory, tensor, pipeline):
    """Metrics of a first step in which no row counts, and how far the weights moved in it and in the next one."""
    trainer = build(directory, tensor, pipeline, "data.skip_rows=[[0,3]]")
    moved, metrics = [], []
    for case in (Case("filler", filler=(0, 1, 2, 3)), None):
        before = weights_of(trainer)
        result = train_step(trainer, rows_of_step(0, trainer.groups, case), 0, LEARNING_RATE)
        moved.append((result.update.applied, (weights_of(trainer) - before).abs().max().item()))
        metrics.append(step_metrics(trainer, result, LEARNING_RATE))
    return moved, metrics


@pytest.mark.parametrize("layout", [pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS])
def test_a_step_in_which_no_row_counts_has_a_gradient_of_zero(layout, tmp_path):
    """Applied, not skipped: it says nothing against the run, and a row of such steps does not end it."""
    for moved, metrics in run_ranks(2, take_a_step_of_filler, str(tmp_path), *LAYOUTS[layout]):
        assert moved[0] == (True, 0.0) and moved[1][0] and moved[1][1] > 1e-4
        empty, healthy = metrics
        zeros = ("ebft/rl_loss", "ebft/ce_loss", "train/loss", "train/grad_norm")
        assert [empty[name] for name in zeros] == [0.0] * 4
        assert all(math.isfinite(value) for value in empty.values())
        assert set(healthy) - set(empty) == {
            *("ebft/alignment", "ebft/diversity", "ebft/mean_reward", "ebft/cfm_loss"),
            *("ebft/advantages_std", "ebft/duplicate_share"),
        }


class Rows:
    """Stands for the loader: the same made-up rows for ever."""

    skips_damaged_rows = False
    stream = SimpleNamespace(sources=())

    def __init__(self, groups):
        self.groups = groups
        self.committed = 0

    @property
    def state(self):
        next_row = FIRST_ROW + GLOBAL_BATCH * self.committed
        return SimpleNamespace(next_row=next_row, sequence_length=1, sources=(), skipped_rows=0)

    def __iter__(self):
        while True:
            yield LoadedBatch(rows_of_step(0, self.groups))

    def commit(self, skipped_rows):
        assert not skipped_rows
        self.committed += 1


class QuietBoundary:
    """Stands for what happens between steps: nothing."""

    def stop_requested(self, progress):
        return False

    def cross(self, progress, is_due):
        return StopReason.NONE

    def take_seconds(self):
        return 0.0

    def finish(self):
        pass


class Beats:
    """Stands for the watchdog: keeps what it was told."""

    def __init__(self):
        self.achievements = []

    def beat(self, achievement):
        self.achievements.append(achievement)


class Lines:
    """Stands for the metrics' writer."""

    def __init__(self):
        self.logged = []

    def log(self, step, metrics):
        self.logged.append((step, metrics))

    def note(self, text):
        assert text.startswith("start: step 1: "), text


def train_until_it_stops(directory):
    """Two healthy steps, then a loss that stays NaN on one rank."""
    loop.MAX_SKIPPED_IN_A_ROW = NUM_SKIPS_BEFORE_THE_END
    skip_rows = "data.skip_rows=[[0, 3], [110, 111]]"  # none of them in `Rows`
    trainer = build(directory, 1, 1, f"output_dir={directory}", "train.max_steps=100", skip_rows)
    beats, lines = Beats(), Lines()
    original = loop.train_step

    def poisoned_later(trainer, batch, step, rate):
        with nullcontext() if step in (0, 2) else nan_loss():
            return original(trainer, batch, step, rate)

    loop.train_step = poisoned_later
    observer = Observer(lines, Path(directory) / "samples.jsonl", None)
    hooks = step_hooks(trainer, None, 100, QuietBoundary(), observer, beats)
    try:
        loop.train(trainer, Rows(trainer.groups), 100, Progress(), hooks, beats)
    except NonFiniteStepError as error:
        # What the other rank has written must be there by now.
        files = sorted(path.name for path in (Path(directory) / faults.DUMP_DIRECTORY).iterdir())
        return str(error), files, beats.achievements, lines.logged
    raise AssertionError("the run continued")


def test_too_many_in_a_row_stop_the_run_with_a_dump_of_every_rank(tmp_path):
    names = [f"step-00000006-rank-000{rank}.json" for rank in range(2)]
    for message, files, achievements, logged in run_ranks(2, train_until_it_stops, str(tmp_path)):
        assert message.startswith("step 6: 3 updates in a row") and str(tmp_path / "non_finite") in message
        assert message.endswith(
            ". A restart will meet the same rows. To leave them out: --set 'data.skip_rows=[[0,3],[110,123]]'"
        )
        assert files == names
        steps = [text for step in range(1, 6) for text in (f"step {step}", f"checkpoints after step {step}")]
        assert achievements == ["evaluation after step 0", *steps]
        # Steps 2, 4, 5 and 6 were skipped; a step that went well starts the count in a row anew.
        assert [(step, metrics["train/skipped_steps"]) for step, metrics in logged] == [
            (1, 0.0),
            (2, 1.0),
            (3, 1.0),
            (4, 2.0),
            (5, 3.0),
        ]
        for _, metrics in logged:
            assert 0 < metrics["perf/step_seconds_min"] <= metrics["perf/step_seconds_max"]
    dumps = [json.loads((tmp_path / "non_finite" / name).read_text()) for name in names]
    assert [dump["rank"] for dump in dumps] == [0, 1] and dumps[0]["step"] == 6
    rows = [[row["row"] for part in dump["micro_batches"] for row in part["rows"]] for dump in dumps]
    assert rows == [[120, 121], [122, 123]]  # as `data.skip_rows` takes them
    assert dumps[1]["micro_batches"][0]["rows"][0]["row_in_batch"] == 2
    healthy, spoiled = (dump["micro_batches"][0] for dump in dumps)
    assert spoiled["loss"]["total"] == "nan" and isinstance(healthy["loss"]["total"], float)
    row = healthy["rows"][0]
    assert row["documents"] == [1, 2]
    assert row["reward"]["count"] == 3 * 5 and row["logprobs"]["count"] == 3 * 5 * 4
    assert row["target_logprobs"]["count"] == 23
    assert row["logprobs"]["not_finite"] == 0 and row["logprobs"]["min"] <= row["logprobs"]["mean"] < 0


def different_times():
    """The second rank says it took longer."""
    groups = make_process_groups(connect())
    return loop.seconds_over_ranks(1.5 + dist.get_rank(), groups.device)


def test_step_times_are_the_extremes_over_ranks():
    expected = {"perf/step_seconds_min": 1.5, "perf/step_seconds_max": 2.5}
    assert run_ranks(2, different_times) == [expected, expected]
