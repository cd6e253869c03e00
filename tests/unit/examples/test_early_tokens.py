"""The example of an advantage estimator against a loop."""

from types import SimpleNamespace

import pytest
import torch


@pytest.mark.parametrize(("num_samples", "decay"), [(1, 0.9), (2, 0.5), (4, 1.0)])
def test_equals_a_loop(entry_of_example, num_samples, decay):
    kind = entry_of_example("early_tokens")
    reward = torch.rand(2, num_samples, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inputs = SimpleNamespace(rewards=SimpleNamespace(reward=reward), plan=SimpleNamespace(generate_length=5))
    advantages = kind(kind.Options(decay=decay)).advantages(inputs)
    assert advantages.shape == (2, num_samples, 3, 5)
    scale = sum(decay**t for t in range(5)) / 5
    for row in range(2):
        for sample in range(num_samples):
            others = [reward[row, other] for other in range(num_samples) if other != sample]
            baseline = sum(others) / len(others) if others else torch.zeros(3, dtype=torch.float64)
            for t in range(5):
                expected = (reward[row, sample] - baseline) * decay**t / scale
                torch.testing.assert_close(advantages[row, sample, :, t], expected, rtol=1e-12, atol=1e-12)
