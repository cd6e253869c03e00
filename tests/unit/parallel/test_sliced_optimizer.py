"""Optimizers of the registry by slices: naive steps, counts by tensor, and what a plugin's optimizer may not do."""

import pytest
import torch
from torch import nn

from ebft_mega.extension.update_rule import Optimizer
from ebft_mega.parallel import optimizer
from ebft_mega.parallel.optimizer import OptimizerSettings, SlicedOptimizer
from tests.other_optimizers import Momentum, Sgd

RATE, DECAY, BETA = 0.1, 0.2, 0.9


def made(rule, weights, is_checked=False):
    settings = OptimizerSettings((BETA, 0.95), DECAY, 1.0, torch.float32, 1, rule=rule, is_checked=is_checked)
    found = SlicedOptimizer([{"params": weights, "weight_decay": DECAY}], settings)
    found.param_groups[0]["lr"] = RATE
    return found


@pytest.mark.parametrize("elements", [1, 7, 2**22])
@pytest.mark.parametrize("rule", [Sgd, Momentum])
def test_steps_by_slices_are_naive_steps(monkeypatch, rule, elements):
    monkeypatch.setattr(optimizer, "UPDATE_ELEMENTS", elements)
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(size, generator=generator)) for size in ((3, 5), (2,), (1, 1))]
    expected = [weight.detach().clone() for weight in weights]
    velocities = [torch.zeros_like(weight) for weight in expected]
    steps = made(rule(), weights)
    for step in range(3):
        for weight, truth, velocity in zip(weights, expected, velocities, strict=True):
            weight.grad = torch.randn(weight.shape, generator=generator)
            velocity.mul_(BETA).add_(weight.grad)
            direction = velocity * (0.1 if step == 0 else 1) if rule is Momentum else weight.grad
            truth.mul_(1 - RATE * DECAY).sub_(RATE * direction)
        steps.step()
    for weight, truth, velocity in zip(weights, expected, velocities, strict=True):
        torch.testing.assert_close(weight.detach(), truth, rtol=1e-6, atol=1e-7)
        assert set(steps.state[weight]) == {"step", *rule.moments}
        if rule is Momentum:
            assert torch.equal(steps.state[weight]["velocity"], velocity)


def test_each_tensor_is_told_its_own_number_of_updates():
    told = []

    class Listener(Optimizer):
        name = "listener"

        def update(self, slices, updates, settings):
            told.append((updates, sorted(part.weights.numel() for part in slices)))

    weights = [nn.Parameter(torch.zeros(size)) for size in (1, 2, 3)]
    steps = made(Listener(), weights)
    for with_gradient in ((0, 2), (0, 1, 2), (0, 1, 2)):
        for number, weight in enumerate(weights):
            weight.grad = torch.ones_like(weight) if number in with_gradient else None
        steps.step()
    assert told == [(0, [1, 3]), (0, [2]), (1, [1, 3]), (1, [2]), (2, [1, 3])]


class Breaks(Momentum):
    """Does what the test asks for."""

    def __init__(self, breaks):
        super().__init__()
        self.breaks = breaks

    def update(self, slices, updates, settings):
        """Break after an update."""
        super().update(slices, updates, settings)
        self.breaks(slices[0])


def double(part):
    part.moments[0].data = part.moments[0].double()


def shorter(part):
    part.weights.data = part.weights[:1]


def infinite(part):
    part.weights[1] = float("inf")


@pytest.mark.parametrize(
    ("breaks", "found", "expected"),
    [
        (double, "velocity of torch.float64 and shape [2]", "torch.float32 and shape [2], changed in place"),
        (shorter, "weights of torch.float32 and shape [1]", "torch.float32 and shape [2], changed in place"),
        (infinite, "weights that are not finite after an update", "finite numbers, as the gradients are"),
        (lambda part: part.moments[5], "an update that raises IndexError", "weights and moments in place"),
    ],
)
def test_what_a_plugins_optimizer_breaks_is_found_and_ends_updates(breaks, found, expected):
    weight = nn.Parameter(torch.zeros(2))
    steps = made(Breaks(breaks), [weight], is_checked=True)
    weight.grad = torch.ones(2)
    steps.step()
    assert steps.fault is not None
    assert steps.fault.found.startswith(found) and steps.fault.expected == expected
    first, after = steps.fault, weight.detach().clone()
    steps.step()
    assert steps.fault is first and torch.equal(weight.detach(), after)


def test_memory_that_runs_out_is_no_fault_of_the_optimizer():
    def runs_out(part):
        raise torch.OutOfMemoryError

    weight = nn.Parameter(torch.zeros(2))
    steps = made(Breaks(runs_out), [weight], is_checked=True)
    weight.grad = torch.ones(2)
    with pytest.raises(torch.OutOfMemoryError):
        steps.step()
