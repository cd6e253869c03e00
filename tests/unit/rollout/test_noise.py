"""Addressed noise: the same numbers for ever, independent in every coordinate, of the right distribution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ebft_mega.rollout.noise import gumbel, noise_keys

MASK = 2**64 - 1
LENGTH = 20_000


def splitmix64(state: int) -> int:
    """The finaliser in Python's unbounded integers."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & MASK
    return state ^ (state >> 31)


def reference_key(seed: int, *coordinates: int) -> int:
    """A key by the documented chain, as a signed 64-bit integer."""
    key = splitmix64(seed & MASK)
    for coordinate in coordinates:
        key = splitmix64((key + (coordinate + 1) * 0x9E3779B97F4A7C15) & MASK)
    return key - 2**64 if key >= 2**63 else key


integers = st.integers(-(2**40), 2**40)


@settings(max_examples=50)
@given(st.integers(-(2**70), 2**70), integers, st.integers(0, 2**40), st.integers(0, 100))
def test_keys_equal_unbounded_integer_arithmetic(seed, step, row, token_index):
    keys = noise_keys(seed, step, torch.tensor([row, row + 3]), 2, 3, token_index)
    assert keys.dtype == torch.int64 and keys.shape == (2, 2, 3)
    for b, actual_row in enumerate((row, row + 3)):
        for j in range(2):
            for k in range(3):
                assert keys[b, j, k].item() == reference_key(seed, step, actual_row, j, k, token_index)


def test_golden_keys():
    """Changing these changes every rollout of every run: never by accident."""
    keys = noise_keys(1, -1, torch.tensor([5, 9]), 2, 2, 0)
    assert keys.flatten().tolist() == [
        -7129359950317117672,
        189856999954623655,
        -952919724639606120,
        3411098587026560175,
        7288055319838290336,
        -4851931393199680529,
        3184192296126884432,
        -8715505518091830211,
    ]


def test_golden_noise():
    """The published first outputs of splitmix64 for the state 1234567, as Gumbel noise."""
    published = torch.tensor(
        [
            bits >> 12
            for bits in (
                6457827717110365317,
                3203168211198807973,
                9817491932198370423,
                4593380528125082431,
                16408922859458223821,
            )
        ],
        dtype=torch.float64,
    )
    uniform = (published + 0.5) / 2**52
    noise = gumbel(torch.tensor(1234567), torch.arange(5))
    torch.testing.assert_close(noise, -torch.log(-torch.log(1 - uniform)), atol=1e-13, rtol=0)
    expected = [0.84186694406412, 1.65689791821467, 0.27479212117642, 1.25050613474837, -0.78982309871445]
    assert noise.tolist() == pytest.approx(expected, abs=1e-12)


def test_one_rollout_alone_has_the_noise_it_has_among_many():
    many = noise_keys(3, 7, torch.arange(6), 4, 5, 2)
    torch.testing.assert_close(noise_keys(3, 7, torch.tensor([4]), 2, 3, 2), many[4:5, :2, :3])
    slots = torch.tensor([70, 3])
    torch.testing.assert_close(
        gumbel(many[2, 1, 1], slots), gumbel(many, torch.arange(100))[2, 1, 1, slots], atol=0, rtol=0
    )


def one_key(seed: int = 0, step: int = 0, token_index: int = 0) -> Tensor:
    return noise_keys(seed, step, torch.tensor([0]), 1, 1, token_index).flatten()


def sequence_along(coordinate: str) -> Tensor:
    """[LENGTH]: noise where only one coordinate counts up."""
    if coordinate in ("seed", "step", "token_index"):
        count = 3000
        keys = torch.cat([one_key(**{coordinate: value}) for value in range(count)])
    elif coordinate == "slot":
        return gumbel(one_key()[0], torch.arange(LENGTH))
    else:
        rows = torch.arange(LENGTH) if coordinate == "row" else torch.tensor([0])
        samples = LENGTH if coordinate == "sample" else 1
        keys = noise_keys(0, 0, rows, samples, LENGTH if coordinate == "block" else 1, 0).flatten()
    return gumbel(keys, torch.tensor([5]))[:, 0]


COORDINATES = ["seed", "step", "row", "sample", "block", "token_index", "slot"]


@pytest.mark.parametrize("coordinate", COORDINATES)
def test_noise_is_gumbel_along_every_coordinate(coordinate):
    """Kolmogorov-Smirnov: the largest distance of the distribution functions, at the 0.1 % level."""
    cumulative = torch.exp(-torch.exp(-sequence_along(coordinate).sort().values))
    count = len(cumulative)
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    distance = torch.maximum((steps[1:] - cumulative).abs().max(), (cumulative - steps[:-1]).abs().max())
    assert distance * count**0.5 < 1.95


@pytest.mark.parametrize("coordinate", COORDINATES)
def test_neighbours_are_uncorrelated_along_every_coordinate(coordinate):
    uniform = torch.exp(-torch.exp(-sequence_along(coordinate))) - 0.5
    variance = 1 / 12
    for lag in (1, 2, 4, 8, 64):
        correlation = (uniform[lag:] * uniform[:-lag]).mean() / variance
        assert abs(correlation) < 4 / len(uniform) ** 0.5


def test_coordinates_are_not_interchangeable():
    """No two places of a small grid share a key: (row 1, sample 0) is not (row 0, sample 1), and so on."""
    keys = [
        noise_keys(seed, step, torch.arange(6), 6, 6, token)
        for seed in range(3)
        for step in range(-1, 5)
        for token in range(6)
    ]
    flat = torch.stack(keys).flatten()
    assert flat.unique().numel() == flat.numel()


def test_noise_is_finite_where_the_hash_is_zero():
    """The hash of 0 is 0, the smallest uniform: reached by the key that cancels the increment of slot 0."""
    key = -0x9E3779B97F4A7C15 + 2**64
    noise = gumbel(torch.tensor(key), torch.tensor([0]))
    assert noise.item() == pytest.approx(36.7368, abs=1e-4)
