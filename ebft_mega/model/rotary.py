"""Angles of rotary position embeddings (RoPE) for given positions."""

from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ebft_mega.architecture.hf_config import Architecture


def inverse_frequencies(architecture: Architecture) -> Tensor:
    """Inverse rotary frequencies as the Hugging Face implementation of the model computes them.

    Returns:
        float32 [head_dim / 2], radians per position.
    """
    # On the CPU also while the modules around are being built on the meta device.
    with torch.device("cpu"):
        return _inverse_frequencies(architecture)


def _inverse_frequencies(architecture: Architecture) -> Tensor:
    config: Any = CONFIG_MAPPING[architecture.model_type](**architecture.hf_config)
    rope_type = config.rope_parameters["rope_type"]
    if rope_type == "default":
        exponents = torch.arange(0, architecture.head_dim, 2, dtype=torch.int64).float() / architecture.head_dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponents)
    frequencies, attention_scale = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))
    assert attention_scale == 1.0, f"rope type {rope_type} scales attention, which the layers here do not"
    return frequencies.float()


def rotary_angles(frequencies: Tensor, positions: Tensor) -> Tensor:
    """Angles in the form megatron-core's layers take, for any positions (repeated, not monotone).

    Args:
        frequencies: float32 [head_dim / 2].
        positions: int64 [S], or [S, B] where they differ between rows.
    Returns:
        float32 [S, 1 or B, 1, head_dim].
    """
    by_row = positions[:, None] if positions.dim() == 1 else positions
    angles = by_row.to(torch.float32)[..., None] * frequencies
    return torch.cat((angles, angles), dim=-1)[:, :, None]
