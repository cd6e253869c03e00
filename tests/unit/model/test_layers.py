"""The parts of a layer that are ours."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ebft_mega.model.layers import GatedSilu


def test_the_activation_equals_silu_of_the_gate_times_up():
    generator = torch.Generator().manual_seed(0)
    gate_and_up = torch.randn(3, 2, 10, dtype=torch.float64, generator=generator, requires_grad=True)
    upstream = torch.randn(3, 2, 5, dtype=torch.float64, generator=generator)
    module = GatedSilu(None)
    found = module(gate_and_up)
    gate, up = gate_and_up.chunk(2, dim=-1)
    expected = F.silu(gate) * up
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    (own,), (other,) = (torch.autograd.grad(out, gate_and_up, upstream) for out in (found, expected))
    torch.testing.assert_close(own, other, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(module, (gate_and_up,))


def test_the_activation_keeps_its_input_alone():
    gate_and_up = torch.randn(4, 6, requires_grad=True)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        GatedSilu(None)(gate_and_up)
    assert kept == [gate_and_up.data_ptr()]
