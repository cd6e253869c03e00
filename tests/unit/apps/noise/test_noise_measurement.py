"""Gradients of single rows: those of the product's own step, by estimator and by token, and what is written of them."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ebft_mega.apps.noise.estimator_specs import read_specs
from ebft_mega.apps.noise.noise_measurement import measure_noise
from ebft_mega.apps.noise.noise_report import noise_report, table_lines, write_report
from ebft_mega.apps.noise.noise_request import NoiseRequest, check_request
from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.tensor_shapes import hf_shapes
from ebft_mega.data.rows.loader import BatchLoader
from ebft_mega.errors import InputError
from ebft_mega.lifecycle.build import build_trainer
from ebft_mega.model.weights.gradient_projections import GradientProjections
from ebft_mega.model.weights.weight_sources import RandomWeights
from ebft_mega.planning.datasets import open_training_rows
from ebft_mega.train.loop import rows_of_step
from ebft_mega.train.step import observe_step, train_step

ROWS, DIRECTIONS, WARMUP = 4, 5, 2


@pytest.fixture
def request_of(inputs, groups):
    """Makes a request for a small model with random weights; the critic is used after its warm-up of two batches."""
    fields = {**inputs.model_fields, "initializer_range": 0.5}
    architecture = Architecture.from_hf(fields, "test")
    weights = RandomWeights(architecture, 1)
    model = inputs.root / "model"
    save_file(
        {name: weights.tensor(name).contiguous() for name in hf_shapes(architecture)}, model / "model.safetensors"
    )
    (model / "config.json").write_text(json.dumps(fields))
    ebft = {"stride": 4, "context_length": 4, "generate_max_len": 3, "n_samples_per_prompt": 3, "temperature": 0.7}
    ebft |= {"use_whitening": False, "alignment": "inner_product", "embed_method": "mean_pooling"}
    config = inputs.write(
        **{f"ebft__{name}": value for name, value in ebft.items()},
        options={"token_critic": {"warmup_batches": WARMUP}},
        data__sequence_length=31,
        train__global_batch_size=ROWS,
        train__dtype="float32",
    )

    def make(*texts, **changes):
        fixed = {"rows": ROWS, "replicates": 2, "directions": DIRECTIONS, "warmup_batches": WARMUP}
        return NoiseRequest(model, inputs.root / "train", read_specs(texts, config, []), **(fixed | changes))

    return make


def measured(request):
    plan = check_request(request)
    return measure_noise(request, plan), plan


def traced(request, groups, noise=0):
    """Projections of the gradient of the batch after the warm-up, and its norm, by the product's own step."""
    plan, config = check_request(request), request.fitting(request.specs[0])
    trainer = build_trainer(config, plan.architecture, plan.feature_architecture, groups)
    batches = iter(BatchLoader(open_training_rows(config), ROWS))
    for step in range(WARMUP):
        observe_step(trainer, rows_of_step(next(batches).rows, config, groups.device), step)
    trainer = replace(trainer, sampling=replace(trainer.sampling, seed=config.seed + noise))
    projections, gradients = GradientProjections(trainer.stage, DIRECTIONS), []

    def look(parts):
        parts = list(parts)
        projections.look(parts)
        gradients.append(torch.cat([part.values for part in parts]))

    train_step(trainer, rows_of_step(next(batches).rows, config, groups.device), WARMUP, 0.0, look=look)
    return np.array(projections.total()), float(gradients[0].norm())


@pytest.mark.parametrize("spec", ["rloo", "token_critic", "rloo:alignment=cosine,n=4"])
def test_the_rows_of_a_batch_add_up_to_its_traced_gradient(request_of, groups, spec):
    request = request_of(spec)
    found, _ = measured(request)
    for noise in range(2):
        expected, norm = traced(request, groups, noise)
        assert norm > 0
        np.testing.assert_allclose(found.projections[0, :, noise].mean(axis=0), expected, atol=1e-4 * norm, rtol=0)
    assert abs(found.projections[0, :, 0] - found.projections[0, :, 1]).max() > 0.1 * norm, "other noise"


def test_estimators_do_not_change_each_other(request_of):
    """Shared rollouts and features, other n, other critics: each measures what it measures alone."""
    texts = ("rloo", "token_critic", "token_critic:rank=4", "rloo:n=4", "prefix_values", "optimal_token_baseline")
    together, _ = measured(request_of(*texts, rows=2))
    for index in (0, 2, 3, 5):
        alone, _ = measured(request_of(texts[index], rows=2))
        size = np.sqrt((alone.projections**2).mean())
        np.testing.assert_allclose(together.projections[index], alone.projections[0], atol=1e-4 * size, rtol=0)
        assert together.nodes[index] == alone.nodes[0]
    differ = [abs(together.projections[0] - other).max() / size for other in together.projections[1:]]
    assert min(differ) > 1e-2


def test_tokens_add_up_to_the_whole(request_of):
    request = request_of("rloo", "token_critic", by_token=True)
    found, plan = measured(request)
    assert request.labels[2:] == tuple(f"{name}/token={t}" for name in ("rloo", "token_critic") for t in range(3))
    for index in range(2):
        parts = found.projections[2 + 3 * index : 5 + 3 * index]
        size = np.sqrt((found.projections[index] ** 2).mean())
        np.testing.assert_allclose(parts.sum(axis=0), found.projections[index], atol=1e-4 * size, rtol=0)
        assert all(abs(part).max() > 1e-3 * size for part in parts)
    figures = noise_report(request, plan, found)["estimators"][1]["euclidean"]
    assert sum(token["share"] for token in figures["tokens"]) == pytest.approx(1)


def test_a_report_and_its_files(request_of, tmp_path):
    request = request_of("rloo", "token_critic", "rloo:T=1")
    found, plan = measured(request)
    report = noise_report(request, plan, found)
    path = write_report(report, request, found, tmp_path / "out")
    assert json.loads(path.read_text()) == json.loads(json.dumps(report, allow_nan=False))
    with np.load(tmp_path / "out" / "projections.npz") as arrays:
        assert arrays["projections"].shape == (3, ROWS, 2, DIRECTIONS) and "projections_adam" not in arrays
        assert tuple(arrays["estimators"]) == request.labels
    first, second, third = report["estimators"]
    assert (second["reference"], third["reference"]) == ("rloo", "rloo:T=1")
    assert first["euclidean"]["within_ratio"] == {"value": 1, "low": 1, "high": 1} and "means" not in first["euclidean"]
    ratio = second["euclidean"]["total_ratio"]["value"]
    at_equal_compute = second["euclidean"]["total_ratio_at_equal_compute"]["value"]
    assert at_equal_compute == pytest.approx(ratio * second["flops_per_row"] / first["flops_per_row"])
    assert len(table_lines(report, "euclidean")) == 4


def test_measured_rows_come_after_those_of_the_critics_and_never_twice(request_of, inputs):
    assert request_of("rloo").first_row == WARMUP * ROWS
    with pytest.raises(InputError, match="none of them twice"):
        check_request(request_of("rloo", rows=20))  # there are 21 rows of 31 tokens
    check_request(request_of("rloo", rows=12))


def test_another_model_than_the_runs_is_refused(request_of, inputs):
    request = request_of("rloo")
    other = inputs.root / "other"
    shutil.copytree(request.model, other)
    (other / "model.safetensors").unlink()
    with pytest.raises(InputError, match="--model"):
        check_request(replace(request, model=other))
