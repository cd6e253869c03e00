"""Projections of gradients, as they are and as Adam scales them, against numpy and against an update of AdamW."""

import numpy as np
import pytest
import torch

from ebft_mega.apps.noise.adam_scale import adam_scale, scale_of_moments
from ebft_mega.apps.noise.sign_projector import SignProjector
from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.partition import StageShape
from ebft_mega.architecture.tensor_shapes import hf_shapes
from ebft_mega.errors import EbftError
from ebft_mega.extension.update_rule import UpdateSettings, UpdateSlice
from ebft_mega.model.stage import Stage
from ebft_mega.model.weights.sign_directions import signs
from ebft_mega.model.weights.stage_weights import hf_tensors, load_weights
from ebft_mega.model.weights.weight_sources import RandomWeights
from ebft_mega.parallel.optimizers.adamw import AdamW
from ebft_mega.parallel.zero import GradientPart

DIRECTIONS, BETA, UPDATES = 3, 0.95, 4


@pytest.fixture
def stage(inputs, groups):
    architecture = Architecture.from_hf(inputs.model_fields, "test")
    stage = Stage(architecture, StageShape.whole(architecture), groups, torch.float32)
    load_weights(stage, RandomWeights(architecture, 1))
    return stage


@pytest.fixture
def gradient(stage):
    generator = torch.Generator().manual_seed(2)
    return {name: torch.randn(each.shape, generator=generator) for name, each in stage.named_parameters()}


def shown(gradient):
    return (GradientPart(name, 0, values.flatten()) for name, values in gradient.items())


class Moments:
    """Second moments of a checkpoint."""

    def __init__(self, squares, stage):
        self.squares = dict(hf_tensors(squares.items(), stage))

    def part(self, kind, name, box):
        assert kind == "exp_avg_sq"
        return self.squares[name][box]


def test_directions_are_those_of_a_step_trace(stage, gradient):
    projector = SignProjector(stage, DIRECTIONS)
    found = projector.projections(projector.flattened(shown(gradient))[None])[0]
    shapes = hf_shapes(stage.architecture)
    for direction in range(DIRECTIONS):
        expected = sum(
            float((values.double() * signs(direction, name, shapes[name])).sum())
            for name, values in hf_tensors(gradient.items(), stage)
        )
        assert float(found[direction]) == pytest.approx(expected, abs=1e-4)
    assert projector.scaled_projections(torch.zeros(1, 5)) is None


def test_many_directions_have_the_norm_of_the_gradient(stage, gradient):
    projector = SignProjector(stage, 150)
    vector = projector.flattened(shown(gradient))
    found = projector.projections(torch.stack((vector, 2 * vector)))
    assert float((found[0] ** 2).mean()) == pytest.approx(float(vector.square().sum()), rel=0.35)
    np.testing.assert_allclose(found[1], 2 * found[0], rtol=1e-5)


def test_the_scale_is_what_an_update_of_adam_divides_by(stage, gradient):
    squares, changes = {}, {}
    for name, own in gradient.items():
        weights, squares[name] = torch.zeros_like(own), 0.1 * own.abs()
        update = UpdateSlice(weights, own.clone(), (torch.zeros_like(own), squares[name]))
        AdamW().update([update], UPDATES - 1, UpdateSettings(1.0, 0.0, (0.0, BETA)))  # the gradient without a mean
        changes[name] = -weights
    scale = scale_of_moments(Moments(squares, stage), stage, BETA, UPDATES)
    projector = SignProjector(stage, DIRECTIONS, scale)
    found = projector.scaled_projections(projector.flattened(shown(gradient))[None])
    expected = projector.projections(projector.flattened(shown(changes))[None])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert abs(expected).max() > 10


def test_what_is_not_finite_is_refused(stage, gradient):
    gradient["final_norm.weight"][0] = torch.nan
    with pytest.raises(EbftError, match="not finite"):
        SignProjector(stage, 1).flattened(shown(gradient))


def test_a_plain_model_has_no_moments(stage, inputs):
    assert adam_scale(inputs.root / "model", stage, BETA) is None
