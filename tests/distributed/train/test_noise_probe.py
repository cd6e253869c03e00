"""The noise of a step's gradient as every layout and ZeRO stage sees it, against gradients of single rows."""

from dataclasses import dataclass

import pytest
import torch

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.lifecycle.build import build_trainer
from ebft_mega.objective import noise_probe
from ebft_mega.objective.noise_probe import GradientNoise
from ebft_mega.parallel.groups import connect, make_process_groups
from ebft_mega.rollout.generate import generate_rollouts
from ebft_mega.train.experience import make_experiences
from ebft_mega.train.gradient_pass import learn
from ebft_mega.train.step import measure, train_step
from tests.distributed.ranks import run_ranks
from tests.distributed.steps import GLOBAL_BATCH, Case, Layout, config_of, rows_of_step

MEASURED = ("ebft.noise_interval=1",)
SAVED = ("learn.reuse_rollout=activations", "zero.hold_parameters=step")
# One start of two ranks for all of them.
LAYOUTS = (
    *((Layout(2, 1, 1, zero_stage=stage), MEASURED) for stage in (0, 1, 2, 3)),
    (Layout(2, 1, 1), (*MEASURED, *SAVED)),
    (Layout(1, 2, 1, sequence_parallel=True), MEASURED),
    (Layout(1, 1, 2), (*MEASURED, "train.micro_batch_size=2")),
    (Layout(1, 1, 2, zero_stage=0), (*MEASURED, "learn.reuse_rollout=off")),
)


@dataclass(frozen=True)
class Seen:
    """What a layout has measured of its only step."""

    noise: GradientNoise
    metrics: dict[str, float]
    grad_norm: float


def measure_layouts(directory: str) -> list[Seen]:
    device = connect()
    torch.cuda.current_device = lambda: device  # as in tests/distributed/steps.py
    noise_probe.BUCKETS, noise_probe.ELEMENTS_AT_ONCE = 50_021, 50_021
    found = []
    for number, (layout, overrides) in enumerate(LAYOUTS):
        groups = make_process_groups(device, layout.tensor, layout.pipeline)
        config = config_of(Case(f"case {number}"), directory, (*overrides, *layout.overrides))
        architecture = Architecture.from_hf(config.model.config, "test")
        trainer = build_trainer(config, architecture, architecture, groups)
        with trainer.noise.around_step(0):
            update = train_step(trainer, rows_of_step(0, groups), 0, 1e-3).update
        found.append(Seen(trainer.noise.last, trainer.noise.metrics(), update.grad_norm))
    return found


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory):
    return run_ranks(2, measure_layouts, str(tmp_path_factory.mktemp("noise")))


@pytest.fixture(scope="module")
def of_rows(groups, tmp_path_factory):
    """What each row adds to the gradient of the step, [4, elements], by passes of its own."""
    config = config_of(Case("rows"), str(tmp_path_factory.mktemp("rows")), ("zero.stage=0",))
    architecture = Architecture.from_hf(config.model.config, "test")
    trainer = build_trainer(config, architecture, architecture, groups)
    rows = rows_of_step(0, groups).split(1)
    with trainer.policy() as policy:
        sampled = generate_rollouts(policy, rows, trainer.plan, trainer.sampling, 0)
    grams, _ = measure(trainer, rows, sampled, None)
    experiences = make_experiences(trainer.rewarding, rows, sampled, grams, None, groups.device)
    gradients: list[torch.Tensor] = []
    for row, experience in zip(rows, experiences, strict=True):
        learn(trainer, [row], [experience], [None])
        trainer.engine.drop_gradient(lambda parts: gradients.append(torch.cat([part.values for part in parts])))
    return torch.stack(gradients).double()


@pytest.mark.parametrize(
    "index", range(len(LAYOUTS)), ids=[f"{layout} {number}" for number, (layout, _) in enumerate(LAYOUTS)]
)
def test_every_layout_sees_the_noise(by_rank, of_rows, index):
    seen, (layout, overrides) = by_rank[0][index], LAYOUTS[index]
    assert by_rank[1][index] == seen, "the same on every rank"
    rows = 2 if "train.micro_batch_size=2" in overrides else 1
    parts = of_rows.view(-1, rows, of_rows.shape[1]).sum(dim=1)
    scale = layout.data if layout.zero_stage else 1  # DeepSpeed's engine gets losses times the number of replicas
    squares, whole = (scale**2 * float(each) for each in (parts.square().sum(), of_rows.sum(dim=0).square().sum()))
    exact = GradientNoise.of_micro_batches(squares, whole, len(parts), rows)
    # Sketches of so many buckets are nearly exact.
    assert seen.noise.noise == pytest.approx(exact.noise, rel=0.03)
    assert seen.noise.signal == pytest.approx(exact.signal, abs=0.03 * whole)
    assert scale * seen.grad_norm == pytest.approx(whole**0.5, rel=1e-4), "the same step"
    expected = exact.signal / (exact.noise / GLOBAL_BATCH)
    assert seen.metrics["ebft/gradient_signal_to_noise"] == pytest.approx(expected, abs=0.06 * abs(expected) + 0.06)
    assert ("ebft/critical_batch_rows" in seen.metrics) == (seen.noise.signal > 0)
