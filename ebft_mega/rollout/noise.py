"""Counter-based noise: a pure function of (seed, step, row, sample, block, token index, slot).

No generator has a state, so no layout, micro-batch split or resumption can change a draw. The mixing function is the
finaliser of splitmix64 (Steele, Lea and Flood, 2014) in 64-bit integers, which wrap alike on every device.
"""

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MULTIPLY_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MULTIPLY_2 = -7723592293110705685  # 0x94D049BB133111EB
_UNIFORM_BITS = 53


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; `>>` on int64 keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MULTIPLY_1
    x = (x ^ _shift_right(x, 27)) * _MULTIPLY_2
    return x ^ _shift_right(x, 31)


def _absorb(state: Tensor, coordinate: Tensor | int) -> Tensor:
    """Fold one more coordinate into a key."""
    return _mix((state ^ coordinate) + _GOLDEN)


def noise_keys(
    seed: int, step: int, rows: Tensor, num_samples: int, num_blocks: int, token_index: int
) -> Tensor:
    """One key per rollout and token.

    Args:
        seed, step: of the run and the optimizer step (any int64).
        rows: int64 [B], index of each row in the global batch.
        token_index: of the generated token in its block.
    Returns:
        int64 [B, n, K].
    Communication: none.
    """
    device = rows.device
    state = _absorb(_absorb(torch.full((), seed, dtype=torch.int64, device=device), step), token_index)
    by_row = _absorb(state, rows)[:, None, None]
    by_sample = _absorb(by_row, torch.arange(num_samples, device=device)[None, :, None])
    return _absorb(by_sample, torch.arange(num_blocks, device=device)[None, None, :])


def gumbel(keys: Tensor, slots: Tensor) -> Tensor:
    """Standard Gumbel noise of some slots (vocabulary places) of each key.

    Args:
        keys: int64 [...]; slots: int64 [..., S], broadcast against `keys[..., None]`.
    Returns:
        float64 [..., S]; never +inf, since the uniform stays inside (0, 1).
    Communication: none.
    """
    bits = _mix(_mix(keys[..., None] + (slots + 1) * _GOLDEN))
    uniform = (_shift_right(bits, 64 - _UNIFORM_BITS).to(torch.float64) + 0.5) * 2.0**-_UNIFORM_BITS
    return -torch.log(-torch.log(uniform))
