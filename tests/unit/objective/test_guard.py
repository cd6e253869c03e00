"""The guard of the loss: nothing changes when all is finite, the gradient says so when something is not."""

import pytest
import torch

from ebft_mega.objective.guard import guarded


def loss_and_gradient(offset=0.0, inputs=()):
    """Value and gradient of a small loss behind the guard."""
    weight = torch.tensor([0.3, -1.7], requires_grad=True)
    loss = guarded(weight.square().sum() + offset, inputs)
    loss.backward()
    return loss.detach(), weight.grad


def test_a_finite_loss_passes_bit_for_bit():
    loss, gradient = loss_and_gradient(inputs=[torch.ones(3, dtype=torch.float64), torch.zeros(0)])
    weight = torch.tensor([0.3, -1.7])
    assert torch.equal(loss, weight.square().sum()) and torch.equal(gradient, 2 * weight)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_loss_or_an_input_that_is_not_finite_gives_a_gradient_that_is_not(bad):
    for loss, gradient in (
        loss_and_gradient(offset=bad),
        loss_and_gradient(inputs=[torch.ones(2), torch.tensor([[1.0, bad]])]),
    ):
        assert not loss.isfinite() and gradient.isnan().all()
