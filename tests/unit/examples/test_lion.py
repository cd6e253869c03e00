"""The example of an optimizer against the paper's algorithm, element by element."""

import torch

from ebft_mega.extension.update_rule import UpdateSettings, UpdateSlice


def sign(value):
    return (value > 0) - (value < 0)


def test_equals_the_paper(entry_of_example):
    optimizer = entry_of_example("lion")()
    draws = torch.Generator().manual_seed(5)
    weights, momentum = torch.randn(7, generator=draws), torch.zeros(7)
    expected, kept = weights.double().tolist(), [0.0] * 7
    settings = UpdateSettings(lr=0.1, weight_decay=0.01, betas=(0.9, 0.99))
    for updates in range(3):
        gradient = torch.randn(7, generator=draws)
        optimizer.update([UpdateSlice(weights, gradient, (momentum,))], updates, settings)
        for i, g in enumerate(gradient.double().tolist()):
            expected[i] -= 0.1 * (sign(0.9 * kept[i] + 0.1 * g) + 0.01 * expected[i])
            kept[i] = 0.99 * kept[i] + 0.01 * g
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(momentum, torch.tensor(kept), rtol=1e-5, atol=1e-6)
