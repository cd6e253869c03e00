"""The sampling noise of each token of a rollout: a hash of seed, step, row, sample, block and token index.

A generator's next number depends on everything drawn before it, hence on micro-batches, ranks and decode
order. Here every draw is a pure function of (seed, step, row, sample, block, token index, slot), without state, so
that a rollout is the same on every parallel layout and after every restart.
"""

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The int64 with the same 64 bits; torch has no unsigned arithmetic."""
    return ((value + 2**63) % 2**64) - 2**63


# Steele, Lea, Flood: "Fast splittable pseudorandom number generators" (OOPSLA 2014), splitmix64.
_INCREMENT = _signed(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = _signed(0x94D049BB133111EB)


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical shift: torch's `>>` copies the sign bit, which the mask removes again."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _mix(bits: Tensor) -> Tensor:
    """splitmix64's finaliser: a bijection of int64 in which every bit of the input affects every bit."""
    bits = (bits ^ _shift_right(bits, 30)) * _MULTIPLIER_1
    bits = (bits ^ _shift_right(bits, 27)) * _MULTIPLIER_2
    return bits ^ _shift_right(bits, 31)


def _absorb(keys: Tensor, coordinate: Tensor) -> Tensor:
    """Keys that also depend on one more coordinate; the two broadcast."""
    return _mix(keys + (coordinate + 1) * _INCREMENT)


def noise_keys(seed: int, step: int, rows: Tensor, num_samples: int, num_blocks: int, token_index: int) -> Tensor:
    """Keys of one token of every rollout; `gumbel` makes noise of a key.

    Args:
        seed: of the run; any integer, taken modulo 2^64.
        step: optimizer step; any integer, so that evaluations can have steps of their own.
        rows: int64 [B], index of each row in the global batch.
        num_samples: n. The first n' < n samples have the same keys for every n.
        num_blocks: K.
        token_index: index of the token in its rollout, 0 .. G - 1.
    Returns:
        int64 [B, n, K] on the device of `rows`, all 64 bits in use.
    Communication: none.
    """
    samples = torch.arange(num_samples, device=rows.device)[:, None]
    blocks = torch.arange(num_blocks, device=rows.device)
    keys = _mix(torch.full_like(rows, _signed(seed)))
    keys = _absorb(keys, torch.full_like(rows, _signed(step)))
    keys = _absorb(keys, rows)[:, None, None]
    keys = _absorb(_absorb(keys, samples), blocks)
    return _absorb(keys, torch.full_like(keys, token_index))


def gumbel(keys: Tensor, slots: Tensor) -> Tensor:
    """Independent standard Gumbel noise for every key and slot.

    Integer arithmetic is exact, so uniforms have the same bits on every device; the two logarithms may differ
    in the last place.

    Args:
        keys: int64 [...].
        slots: int64 [S], non-negative; which of a key's numbers.
    Returns:
        float64 [..., S], always finite: between -3.61 and 36.75.
    Communication: none.
    """
    bits = _absorb(keys[..., None], slots)
    # 52 bits and a half are exact in float64, so u is never 0 or 1 and the noise never infinite. The rare
    # large values of the noise come from u near 0, where floating point is fine-grained.
    uniform = (_shift_right(bits, 12).to(torch.float64) + 0.5) * 2.0**-52
    return -torch.log(-torch.log1p(-uniform))
