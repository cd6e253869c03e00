"""A micro-batch of one row, whose strides torch lets be anything."""

import torch

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.partition import StageShape
from ebft_mega.model.stage import Stage
from tests.conftest import tiny_config
from tests.memory import peak_tensor_bytes

TOKENS, OUT = 256, 1024


def test_a_frozen_matrix_is_not_copied_for_every_position_of_one_row(groups):
    architecture = Architecture.from_hf(tiny_config("llama"), "test")
    stage = Stage(architecture, StageShape.whole(architecture), groups, torch.bfloat16)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.zero_()  # a stage is made of uninitialised memory
        hidden = stage.embed(torch.zeros(1, TOKENS, dtype=torch.long))
    assert hidden.stride() == torch.empty(hidden.shape).stride()
    weight = torch.zeros(hidden.shape[-1], OUT, dtype=torch.bfloat16)
    _, needed = peak_tensor_bytes(lambda: torch.matmul(hidden, weight))
    assert needed < 1.3 * TOKENS * OUT * 2
    # Contiguous as well, and the trap.
    odd = hidden.as_strided(hidden.shape, (hidden.shape[-1], hidden.numel(), 1))
    assert odd.is_contiguous() and torch.equal(odd, hidden)
    _, wasted = peak_tensor_bytes(lambda: torch.matmul(odd, weight))
    # Which kernel torch takes depends on the CPU; some have no trap.
    assert wasted > 5 * needed or wasted <= 1.3 * needed
