"""Fixed directions of random signs in the space of a model's parameters, which are the same at every parallel layout.

The inner product of a gradient with one of them says something of every element in a single number: over random signs
the expectation of its square is the squared norm of the gradient.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ebft_mega.architecture.tensor_shapes import hf_shapes
from ebft_mega.model.stage import Stage
from ebft_mega.model.weights.weight_layout import Box, packing_of

NUM_DIRECTIONS = 16  # of a step trace
_WORDS_OF_COUNTER = 4  # 64-bit words that Philox makes of one value of its counter


def signs(direction: int, name: str, shape: Sequence[int], box: Box | None = None) -> Tensor:
    """The signs of one Hugging Face tensor, or of a part of it, in one direction.

    Sign i in row-major order is that of bit i, lowest bits first, of numpy's Philox with a key from (direction, name).

    Args:
        direction: its number, at least 0.
        name, shape: the whole tensor's, as in the file.
        box: the part; None: all of it. Only its rows (the first dimension) are drawn.
    Returns:
        int8, +1 and -1, of the shape of the part.
    """
    rows, *others = box if box is not None else tuple(slice(0, size) for size in shape)
    row = math.prod(shape[1:])
    start, stop = rows.start * row, rows.stop * row
    key = int.from_bytes(hashlib.sha256(f"{direction}:{name}".encode()).digest()[:8], "little")
    generator = np.random.Philox(key=key)
    counter = start // (64 * _WORDS_OF_COUNTER)
    generator.advance(counter)
    first = counter * 64 * _WORDS_OF_COUNTER  # of the bits that are drawn
    words = generator.random_raw(-(-(stop - first) // 64))
    bits = np.unpackbits(words.astype("<u8").view("u1"), bitorder="little")[start - first : stop - first]
    values = bits.view(np.int8).reshape(rows.stop - rows.start, *shape[1:])[:, *others]
    return torch.from_numpy(2 * values - 1)


def parameter_signs(stage: Stage, parameter: str, direction: int) -> Tensor:
    """The signs of this tensor-parallel rank's part of a stage's parameter in one direction, in the parameter's order.

    Args:
        parameter: name in `Stage.named_parameters()`. That of a tied head is the embedding's: the same tensor.
        direction: see `signs`.
    Returns:
        int8, of the parameter's whole shape (also where it is partitioned), on the CPU; padding of the vocabulary is 0.
    """
    groups, shapes = stage.groups, hf_shapes(stage.architecture)
    packing = packing_of(parameter, stage.architecture, stage.shape.first_layer, groups.tensor_parallel_size)
    boxes = [(name, packing.box(shapes[name], groups.tensor_parallel_rank)) for name in packing.sources]
    return packing.pack(tuple(signs(direction, name, shapes[name], box) for name, box in boxes))
