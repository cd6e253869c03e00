"""Angles of rotary position embeddings (RoPE) for given positions."""

import math

import torch
from torch import Tensor

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.rotary_settings import RotarySettings


def inverse_frequencies(architecture: Architecture) -> Tensor:
    """Inverse rotary frequencies, bit for bit as the Hugging Face implementation of the model computes them.

    Returns:
        float32 [head_dim / 2], radians per position.
    Source: transformers 5, `modeling_rope_utils.py`.
    """
    # On the CPU also while the modules around are being built on the meta device.
    with torch.device("cpu"):
        settings, head_dim = architecture.rotary, architecture.head_dim
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        frequencies = 1.0 / (settings.rope_theta**exponents)
        if settings.factor is None:
            return frequencies
        if settings.rope_type == "linear":
            return frequencies / settings.factor
        return _stretched(frequencies, settings, settings.factor)


def _stretched(frequencies: Tensor, settings: RotarySettings, factor: float) -> Tensor:
    """Llama 3's scaling: long wavelengths are stretched, short ones are not, and between them it is interpolated."""
    low, high, original = settings.low_freq_factor, settings.high_freq_factor, settings.original_max_position_embeddings
    assert low is not None and high is not None and original is not None, "resolve_rotary lets nothing else pass"
    wavelengths = 2 * math.pi / frequencies
    stretched = torch.where(wavelengths > original / low, frequencies / factor, frequencies)
    share = (original / wavelengths - low) / (high - low)
    between = (1 - share) * stretched / factor + share * stretched
    is_between = ~(wavelengths < original / high) * ~(wavelengths > original / low)
    return torch.where(is_between, between, stretched)


def rotary_angles(frequencies: Tensor, positions: Tensor) -> Tensor:
    """Angles in the form megatron-core's layers take, for any positions (repeated, not monotone).

    Args:
        frequencies: float32 [head_dim / 2].
        positions: int64 [S].
    Returns:
        float32 [S, 1, 1, head_dim].
    """
    angles = positions.to(torch.float32)[:, None] * frequencies
    return torch.cat((angles, angles), dim=-1)[:, None, None]
