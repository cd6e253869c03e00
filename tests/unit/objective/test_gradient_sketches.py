"""The noise of a gradient from sketches of its micro-batches: unbiased, linear, and only in the steps that are due."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.config.load import load_config
from ebft_mega.errors import ConfigError
from ebft_mega.lifecycle.build import build_trainer
from ebft_mega.metrics.metric_keys import terms_among
from ebft_mega.objective.noise_probe import BUCKETS, ELEMENTS_AT_ONCE, GradientNoise, add_sketch, sketch_seed
from ebft_mega.parallel.roles import ParameterRole
from ebft_mega.train.step import train_step
from ebft_mega.types import TokenBatch


def sketch_of(gradient, seed=3):
    sketch = torch.zeros(BUCKETS, dtype=torch.float64)
    add_sketch(sketch, gradient, seed)
    return sketch


def test_both_parts_are_unbiased():
    generator = np.random.default_rng(0)
    signal, noise, micro_batches, rows = 0.5, 6.0, 4, 3
    found = []
    for _ in range(4000):
        of_rows = signal**0.5 / 3 + generator.normal(size=(micro_batches, rows, 9)) * (noise / 9) ** 0.5
        parts = of_rows.sum(axis=1) / (micro_batches * rows)
        squares, whole = (parts**2).sum(), (parts.sum(axis=0) ** 2).sum()
        found.append(GradientNoise.of_micro_batches(squares, whole, micro_batches, rows))
    for name, expected in (("signal", signal), ("noise", noise)):
        values = np.array([getattr(each, name) for each in found])
        error = values.std() / len(values) ** 0.5
        assert abs(values.mean() - expected) < 4 * error < 0.2 * expected, name


def test_what_is_logged():
    assert GradientNoise(2.0, 64.0).metrics(rows=16) == {
        "ebft/gradient_signal_to_noise": 0.5,
        "ebft/critical_batch_rows": 32.0,
    }
    assert GradientNoise(-1.0, 64.0).metrics(16) == {"ebft/gradient_signal_to_noise": -0.25}
    assert GradientNoise(1.0, 0.0).metrics(16) == {}
    assert GradientNoise(1.0, 10.0).plus(GradientNoise(2.0, 20.0)) == GradientNoise(2.9, 29.0)


def test_no_term_of_the_reward_is_taken_for_it():
    assert terms_among(GradientNoise(2.0, 64.0).metrics(rows=16)) == ()


def test_a_sketch_is_linear_and_has_the_norm_of_its_gradient():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 300, 700, generator=generator)
    torch.testing.assert_close(sketch_of(first) + sketch_of(second), sketch_of(first + second), rtol=0, atol=1e-3)
    assert float(sketch_of(first).square().sum()) == pytest.approx(float(first.square().sum()), rel=0.2)
    other = sketch_of(first, seed=4)
    assert abs(float(other @ sketch_of(first))) < 0.2 * float(first.square().sum()), "other signs"


def test_of_few_elements_it_is_exact_and_longer_ones_are_cut():
    few = torch.arange(float(BUCKETS))
    assert float(sketch_of(few).square().sum()) == pytest.approx(float(few.square().sum()), rel=1e-6)
    long = torch.zeros(ELEMENTS_AT_ONCE + 5)
    long[-1] = 2.0
    assert sketch_of(long).abs().nonzero().tolist() == [[4]] and float(sketch_of(long).abs().sum()) == 2


def test_seeds_are_equal_where_parts_of_one_gradient_are(groups):
    def at(tensor, stage, name, **role):
        place = replace(groups)  # only its ranks are asked for
        ranks = {"tensor_parallel_rank": tensor, "pipeline_rank": stage}
        return sketch_seed(name, ParameterRole(**role), type("Place", (), vars(place) | ranks)())

    assert at(1, 0, "norm") is None and at(0, 0, "norm") is not None
    assert at(0, 0, "norm", partial_gradient=True) == at(1, 0, "norm", partial_gradient=True)
    assert at(0, 0, "layer", sharded=True) != at(1, 0, "layer", sharded=True)
    assert at(0, 0, "layer", sharded=True) != at(0, 1, "layer", sharded=True)
    first, last = at(0, 0, "embedding.weight", tied=True), at(0, 1, "head.weight", tied=True, copy=True)
    assert first == last is not None


def test_only_steps_that_are_due_are_measured(inputs, groups):
    config = load_config(
        inputs.write(ebft__noise_interval=2, train__dtype="float32", zero__stage=0, train__global_batch_size=4)
    )
    architecture = Architecture.from_hf({**inputs.model_fields, "initializer_range": 0.5}, "test")
    fields = config.model.model_copy(update={"init_from": None, "config": inputs.model_fields})
    trainer = build_trainer(config.model_copy(update={"model": fields}), architecture, architecture, groups)
    rows = TokenBatch(torch.randint(0, 90, (4, 32)), torch.zeros(4, 32, dtype=torch.long), torch.arange(4))
    found = []
    for step in range(4):
        with trainer.noise.around_step(step):
            train_step(trainer, rows, step, 0.0)
        found.append(trainer.noise.metrics())
    assert [bool(metrics) for metrics in found] == [False, True, False, True]
    assert found[1] != found[3], "another measurement"


def test_a_step_of_one_micro_batch_is_refused(inputs):
    path = inputs.write(ebft__noise_interval=5, train__micro_batch_size=8)
    with pytest.raises(ConfigError, match="at least two micro-batches"):
        load_config(path)
