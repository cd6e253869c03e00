"""Projections of the gradient of one process at ZeRO stage 0; those of layouts are in `tests/distributed`."""

import pytest
import torch

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.lifecycle.build import build_trainer
from ebft_mega.model.weights import gradient_projections
from ebft_mega.model.weights.gradient_projections import GradientProjections
from ebft_mega.train.step import train_step
from tests.distributed.plain import plain_steps
from tests.distributed.steps import LEARNING_RATE, Case, config_of, rows_of_step

NUM_DIRECTIONS = 256


@pytest.mark.parametrize(
    "case", [Case("tied"), Case("untied", model_type="qwen2", tied=False)], ids=lambda case: case.name
)
def test_projections_are_those_of_plain_torch_and_their_mean_square_is_that_of_the_norm(
    case, groups, tmp_path, monkeypatch
):
    monkeypatch.setattr(gradient_projections, "CHUNK_ELEMENTS", 1000)
    truth = plain_steps(case, groups, str(tmp_path))
    config = config_of(case, str(tmp_path), ("zero.stage=0",))
    architecture = Architecture.from_hf(config.model.config, "test")
    trainer = build_trainer(config, architecture, architecture, groups)
    projections = GradientProjections(trainer.stage, NUM_DIRECTIONS)
    result = train_step(trainer, rows_of_step(0, groups, case), 0, LEARNING_RATE, projections.look)
    found, norm = torch.tensor(projections.total(), dtype=torch.float64), result.update.grad_norm
    assert norm > config.train.grad_clip  # so what is clipped would be seen
    expected = torch.tensor(truth.projections[0], dtype=torch.float64)
    assert (found[:16] - expected).abs().max() <= 1e-5 * norm
    # Each has a variance of at most 2 around 1.
    assert abs(found.square().mean() / norm**2 - 1) < 4 * (2 / NUM_DIRECTIONS) ** 0.5
