"""The first steps give the numbers that are written down, and a step without repeatable kernels ends."""

import json
import os

import pytest
import torch

from ebft_mega.errors import SurroundingsError
from ebft_mega.runtime.repeatability import REPEATABLE_WORKSPACES, WORKSPACE, use_deterministic_kernels
from ebft_mega.train import gradient_pass
from tests.golden import CURVE, KEYS, STEPS, curve, make_trainer

pytestmark = pytest.mark.usefixtures("job_of_one")
TOLERANCE = 1e-4  # of the largest value of a curve


@pytest.fixture
def job_of_one(monkeypatch):
    """What DeepSpeed reads of the environment."""
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)


def test_the_first_steps_are_those_of_the_golden_curve(groups):
    """On another processor a sampled token may differ where two scores lie within rounding: from there all does."""
    golden, found = json.loads(CURVE.read_text(encoding="utf-8")), curve(make_trainer(groups))
    assert set(golden) == set(KEYS) and all(len(values) == STEPS for values in golden.values())
    for key, values in golden.items():
        scale = max(map(abs, values))
        assert found[key] == pytest.approx(values, rel=0, abs=TOLERANCE * scale), key


@pytest.fixture
def repeatable(monkeypatch):
    """This process with deterministic kernels, for one test."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    monkeypatch.delenv(WORKSPACE, raising=False)
    use_deterministic_kernels(os.environ)
    yield
    torch.use_deterministic_algorithms(False)


def test_an_operation_that_does_not_repeat_its_bits_ends_the_step(groups, repeatable, monkeypatch):
    assert os.environ[WORKSPACE] in REPEATABLE_WORKSPACES
    trainer = make_trainer(groups)
    assert curve(trainer, 1)["train/grad_norm"][0] > 0
    original = gradient_pass.loss_terms

    def disordered(logprobs, *rest):
        logprobs.target.detach().put_(torch.zeros(2, dtype=torch.long), torch.zeros(2))
        return original(logprobs, *rest)

    monkeypatch.setattr(gradient_pass, "loss_terms", disordered)
    with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
        curve(trainer, 1)


def test_a_workspace_that_makes_cublas_choose_is_refused():
    with pytest.raises(
        SurroundingsError, match=r"CUBLAS_WORKSPACE_CONFIG: found ':0:0'; expected :4096:8 or :16:8"
    ) as e:
        use_deterministic_kernels({WORKSPACE: ":0:0"})
    assert e.value.exit_code == 2 and not torch.are_deterministic_algorithms_enabled()
