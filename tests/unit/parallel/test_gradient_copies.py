"""A rank holds no more copies at ZeRO stages 1 to 3 than at stage 0, and what each workaround for that saves."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from ebft_mega.parallel import optimizer
from ebft_mega.parallel.deepspeed_adapter import deepspeed_engine, deepspeed_setup, optimizer_storage
from ebft_mega.parallel.optimizer import OptimizerSettings, SlicedOptimizer
from ebft_mega.parallel.optimizers.adamw import AdamW
from ebft_mega.parallel.zero import make_engine
from tests.memory import peak_tensor_bytes
from tests.unit.planning.test_memory_measured import measured

LAYERS, SIZE = 16, 256
NUM_PARAMETERS = LAYERS * (SIZE * SIZE + SIZE)
BUCKET = 2 * SIZE * SIZE
# bfloat16 parameters; float32 gradients, master weights and moments.
STATES = 2 + 4 + 4 + 8
# Stage 2 has gradients only between the first backward pass and the update.
HELD = {0: STATES, 1: STATES, 2: STATES - 4, 3: STATES}


class Layers(nn.Module):
    """Matrices of one size."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(SIZE, SIZE, dtype=torch.bfloat16) for _ in range(LAYERS))

    def forward(self, compute):
        return compute(self)


def loss(module):
    x = torch.ones(1, SIZE, dtype=torch.bfloat16)
    for layer in module.layers:
        x = layer(x)
    return x.float().square().sum()


def fill(module, gathered, is_reader):
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            with gathered(parameter):
                generator = torch.Generator().manual_seed(index)
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 16)


def bytes_a_parameter(groups, stage):
    """What is held between steps, and what a backward pass and an update need besides."""
    settings = OptimizerSettings((0.9, 0.95), 0.1, 1.0, torch.bfloat16, 1, stage, rule=AdamW())

    def start():
        engine = make_engine(Layers, fill, lambda _: {}, settings, groups)
        engine.backward(engine.forward(loss))
        engine.step(1e-3)
        return engine

    engine, held, _ = measured(start)
    _, learning = peak_tensor_bytes(lambda: engine.backward(engine.forward(loss)))
    _, updating = peak_tensor_bytes(lambda: engine.step(1e-3))
    return tuple(size / NUM_PARAMETERS for size in (held, learning, updating))


@pytest.fixture
def small(monkeypatch):
    """Slices and buckets that are small beside the stage; and DeepSpeed's only rank."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(optimizer, "UPDATE_ELEMENTS", SIZE * SIZE // 4)
    monkeypatch.setattr(deepspeed_setup, "REDUCE_ELEMENTS", BUCKET)


@contextmanager
def replaced(owner, name, value):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, value)
        yield


def config_with(**changes):
    """DeepSpeed's configuration with other entries; those of `zero_optimization` by their own names."""
    original = deepspeed_engine.deepspeed_config

    def config(settings, groups):
        found = original(settings, groups)
        for name, value in changes.items():
            (found["zero_optimization"] if name in found["zero_optimization"] else found)[name] = value
        return found

    return replaced(deepspeed_engine, "deepspeed_config", config)


@pytest.mark.parametrize("stage", HELD)
def test_a_step_holds_the_states_a_bucket_and_a_slice(groups, small, stage):
    held, learning, updating = bytes_a_parameter(groups, stage)
    assert held == pytest.approx(HELD[stage], rel=0.02)
    # A gradient or two; and of a bucket bfloat16 gradients and in float32 the buffer or two copies (gloo's is one).
    assert learning < 4 * (stage == 2) + (14 * BUCKET / NUM_PARAMETERS if stage > 1 else 0) + 0.5
    # The norm's float64 copy of the largest gradient.
    assert updating < 8 / LAYERS + 0.1


def plain_adamw(groups, settings):
    return torch.optim.AdamW(groups, lr=1e-3, betas=settings.betas)


def sliced_adamw(groups, settings):
    found = SlicedOptimizer(groups, settings)
    for group in found.param_groups:
        group["lr"] = 1e-3  # as an engine sets it
    return found


WITHOUT = {
    "slices": (lambda: replaced(deepspeed_engine, "SlicedOptimizer", plain_adamw), 1, "updating", 7),
    "gradients in place": (lambda: replaced(optimizer_storage, "end_to_end", lambda tensors, flatten: flatten(tensors)),
                           3, "updating", 3.5),
    "a bucket of its own": (lambda: config_with(contiguous_gradients=True), 3, "held", STATES + 0.4),
    "small buckets": (lambda: config_with(reduce_bucket_size=2**20), 3, "learning", 12),
    "gradients added at once": (lambda: config_with(bf16={"enabled": True}), 1, "learning", 1.5),
    "groups reduced one by one": (lambda: replaced(deepspeed_engine, "ALLREDUCE_ELEMENTS", 2**20), 1, "updating", 3.5),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", WITHOUT)
def test_more_is_held_without(groups, small, name):
    without, stage, moment, least = WITHOUT[name]
    with without():
        found = dict(zip(("held", "learning", "updating"), bytes_a_parameter(groups, stage), strict=True))
    assert found[moment] > least, found


def steps_of(make, sizes):
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(size, generator=generator) / 50) for size in sizes]
    groups = [{"params": weights[::2], "weight_decay": 0.1}, {"params": weights[1::2], "weight_decay": 0.0}]
    adamw = make(groups, OptimizerSettings((0.9, 0.95), 0.1, 1.0, torch.float32, 1, rule=AdamW()))
    for _ in range(3):
        for weight in weights[:-1]:
            weight.grad = torch.randn(weight.shape, generator=generator) / 1000
        adamw.step()
    states = [adamw.state[weight] for weight in weights[:-1]]
    assert weights[-1] not in adamw.state or not adamw.state[weights[-1]]  # it never had a gradient
    return [*weights, *(state[kind] for state in states for kind in ("exp_avg", "exp_avg_sq", "step"))]


@pytest.mark.parametrize("elements", [1, 7, 64, 1000, 2**22])
def test_slices_change_no_bit(monkeypatch, elements):
    sizes = [(33, 5), (1001,), (3,), (40, 40), (2,)] if elements > 1 else [(3, 2), (5,), (1,), (2,)]
    truth = steps_of(plain_adamw, sizes)
    monkeypatch.setattr(optimizer, "UPDATE_ELEMENTS", elements)
    for value, expected in zip(steps_of(sliced_adamw, sizes), truth, strict=True):
        assert value.dtype == expected.dtype and torch.equal(value, expected)
