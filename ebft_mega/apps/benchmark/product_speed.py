"""How fast this machine multiplies matrices of a model's sizes: what a step's speed is a share of."""

import time

import torch
import torch.nn.functional as F

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.vocabulary_blocks import HEAD_ROWS

MEASURED_SECONDS = 0.5  # of each matrix


def product_flops_per_second(architecture: Architecture, dtype: torch.dtype, device: torch.device) -> float:
    """FLOPs per CPU second (on a GPU per second of wall time) of the model's matrix products alone.

    One layer's four matrices and the head's, each with `HEAD_ROWS` rows again and again, weighted as a forward pass
    has them: every layer's once, the head's for one row in `num_hidden_layers`.
    """
    a = architecture
    layer = [
        (a.hidden_size, a.query_width + 2 * a.key_value_width),
        (a.query_width, a.hidden_size),
        (a.hidden_size, 2 * a.intermediate_size),
        (a.intermediate_size, a.hidden_size),
    ]
    flops = seconds = 0.0
    for inputs, outputs in [*layer, (a.hidden_size, a.vocab_size // a.num_hidden_layers)]:
        rows, weight = torch.ones(HEAD_ROWS, inputs), torch.ones(outputs, inputs)
        seconds += _seconds_of_product(rows.to(device, dtype), weight.to(device, dtype))
        flops += 2.0 * HEAD_ROWS * inputs * outputs
    return flops / seconds


def _seconds_of_product(rows: torch.Tensor, weight: torch.Tensor) -> float:
    """The mean of as many as fit into `MEASURED_SECONDS`, after one that does not count."""
    is_cuda = rows.device.type == "cuda"
    clock = time.perf_counter if is_cuda else time.process_time

    def multiply() -> None:
        F.linear(rows, weight)
        if is_cuda:
            torch.cuda.synchronize()

    multiply()
    count, start = 0, clock()
    while clock() - start < MEASURED_SECONDS:
        multiply()
        count += 1
    return (clock() - start) / count
