"""What `tools/gradient_noise.py` asks for, with the measurement itself replaced, and what it refuses."""

import pytest

from ebft_mega.apps.noise import noise_measurement

PLAIN = {
    "ebft__use_whitening": False,
    "ebft__alignment": "inner_product",
    "ebft__stride": 4,
    "ebft__generate_max_len": 4,
    "ebft__context_length": 4,
    "train__global_batch_size": 4,
}


class StopHereError(Exception):
    """Instead of a measurement."""


@pytest.fixture
def asked(monkeypatch):
    """The requests that are measured."""
    requests = []

    def measure(request, plan):
        requests.append((request, plan))
        raise StopHereError

    monkeypatch.setattr(noise_measurement, "measure_noise", measure)
    return requests


def places(inputs, tmp_path):
    model, data = inputs.root / "model", inputs.root / "train"
    config = inputs.write(**PLAIN)
    return ("--model", model, "--data", data, "--config", config, "--output", tmp_path / "out")


def test_a_dry_run_says_what_would_be_measured(inputs, run_tool, asked, tmp_path):
    options = ("--warmup-batches", 2, "--rows", 3, "--replicates", 2, "--directions", 8, "--samples", 3, 4)
    code, out, err = run_tool("gradient_noise.py", *places(inputs, tmp_path), *options, "--dry-run", "--by-token")
    assert (code, err) == (0, "")
    first = "rloo:alignment=inner_product,n=3"
    assert f"{first}: compared with {first}" in out
    assert f"token_critic:alignment=inner_product,n=4: compared with {first}" in out
    assert "rows 8 to 10 of the run, 2 times, in 8 directions: 120 backward passes" in out
    assert not asked and not (tmp_path / "out").exists()


def test_what_is_asked_for_is_measured(inputs, run_tool, asked, tmp_path):
    with pytest.raises(StopHereError):
        run_tool("gradient_noise.py", *places(inputs, tmp_path), "--warmup-batches", 1, "--rows", 2, "--set", "seed=5")
    ((request, plan),) = asked
    assert (request.rows, request.replicates, request.directions, request.warmup_batches) == (2, 4, 64, 1)
    assert [spec.name for spec in request.specs] == ["rloo", "token_critic"]
    assert {spec.config.seed for spec in request.specs} == {5} and plan.architecture.hidden_size == 16


def test_bad_input_is_refused_with_everything_that_is_wrong(inputs, run_tool, asked, tmp_path):
    code, _, err = run_tool("gradient_noise.py", *places(inputs, tmp_path))
    assert code == 2 and "--data" in err and "80 rows for the critics and 32 to measure, none of them twice" in err
    code, _, err = run_tool("gradient_noise.py", *places(inputs, tmp_path), "--estimators", "rlo", "rloo:q=1")
    assert code == 2 and "--estimators rlo:" in err and "--estimators rloo:q=1:" in err
    code, _, err = run_tool("gradient_noise.py", *places(inputs, tmp_path), "--replicates", 1)
    assert code == 2 and "a whole number from 2" in err
    assert not asked
