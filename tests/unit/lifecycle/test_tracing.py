"""Traces of one process: which step and rows they are of, with which noise, and the projections of the gradient."""

import json
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from ebft_mega.config.load import load_config
from ebft_mega.lifecycle import tracing
from ebft_mega.lifecycle.inputs import make_loader
from ebft_mega.lifecycle.run import run_training
from ebft_mega.planning.run_plan import check_run
from ebft_mega.planning.short_plan import TraceRequest
from ebft_mega.runtime.stop_requests import Signals
from ebft_mega.train import gradient_pass, step_trace
from tests.distributed.runs import TEXT, make_datasets

SEED = 11  # of the text


@pytest.fixture(scope="module")
def directory(tmp_path_factory, groups):
    directory = tmp_path_factory.mktemp("traced")
    make_datasets(directory)
    (directory / "run.yaml").write_text(TEXT % ("llama", "true"))
    return directory


def configuration(directory, *overrides):
    names = {"output_dir": "out", "data.shards": "train", "evaluation.shards": "held_out", "data.cache": "cache"}
    places = [f"{key}={directory / name}" for key, name in names.items()]
    return load_config(directory / "run.yaml", [*places, "zero.stage=0", *overrides])


@pytest.fixture
def trace(directory, tmp_path):
    def written(*overrides, **asked):
        """Tensors and numbers of a trace."""
        config, place = configuration(directory, *overrides), tmp_path / "-".join(["trace", *map(str, asked.values())])
        request = TraceRequest(place, **asked)
        code = run_training(config, check_run(config, 1), request, Signals(), time.monotonic(), lambda output: output)
        assert code == 0 and not config.output_dir.exists()
        return load_file(place / "step.safetensors"), json.loads((place / "step.json").read_text())

    return written


def test_the_batch_after_the_warm_up_is_traced_as_its_step(directory, trace, groups, monkeypatch):
    """Noise of its own has the traced step alone."""
    taken = []

    def note(call, kind):
        def noted(trainer, batch, step, *others):
            taken.append((kind, trainer.sampling.seed, step, batch.tokens))
            return call(trainer, batch, step, *others)

        return noted

    monkeypatch.setattr(tracing, "observe_step", note(tracing.observe_step, "observed"))
    monkeypatch.setattr(step_trace, "train_step", note(step_trace.train_step, "traced"))
    tensors, numbers = trace(warmup=2, noise=5)
    assert [each[:3] for each in taken] == [("observed", SEED, 0), ("observed", SEED, 1), ("traced", SEED + 5, 2)]
    batches = iter(make_loader(configuration(directory), groups, is_trace=True))
    for _, _, _, tokens in taken:
        assert torch.equal(tokens, next(batches).rows.tokens)
    assert torch.equal(tensors["tokens"], taken[-1][-1])
    assert (numbers["step"], numbers["noise"]) == (2, 5)


def test_noise_changes_the_rollouts_and_not_the_rows(trace):
    (plain, plain_numbers), (other, other_numbers) = trace(), trace(noise=1)
    assert torch.equal(plain["tokens"], other["tokens"])
    assert (plain["rollouts"] != other["rollouts"]).any()
    before = "parameter_checksum_before"
    assert plain_numbers["step"] == other_numbers["step"] == 0 and plain_numbers[before] == other_numbers[before]


def test_projections_are_written_unless_the_step_is_skipped(trace, monkeypatch):
    numbers = trace()[1]
    squares = [value**2 / numbers["grad_norm"] ** 2 for value in numbers["gradient_projections"]]
    assert len(squares) == 16 and 0.2 < sum(squares) / 16 < 3  # their expectation is 1
    original = gradient_pass.loss_terms

    def spoiled(*arguments, **named):
        terms = original(*arguments, **named)
        return replace(terms, total=terms.total * torch.nan)

    monkeypatch.setattr(gradient_pass, "loss_terms", spoiled)
    assert trace(noise=0)[1]["gradient_projections"] is None


def test_a_critic_learns_in_the_warm_up_and_the_weights_do_not(trace):
    overrides = ("ebft.advantage_estimator=token_critic", "ebft.alignment=inner_product", "ebft.use_whitening=false")
    numbers = []
    for warmup, is_warm in ((3, False), (4, True)):  # four batches are held first
        tensors, found = trace(*overrides, warmup=warmup)
        advantage = tensors["advantage"]
        assert (advantage.ndim == 4 and bool((advantage != advantage[..., :1]).any())) == is_warm
        numbers.append(found["parameter_checksum_before"])
    assert numbers[0] == numbers[1] == trace()[1]["parameter_checksum_before"]
