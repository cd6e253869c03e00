"""Statistics of tensors that may hold anything."""

import math

import torch

from ebft_mega.train.non_finite import statistics


def test_statistics_leave_out_what_is_not_finite_and_count_it():
    values = torch.tensor([[1.0, math.nan], [-3.0, math.inf], [5.0, -math.inf]])
    assert statistics(values) == {"count": 6, "not_finite": 3, "min": -3.0, "max": 5.0, "mean": 1.0}


def test_statistics_of_nothing_finite():
    assert statistics(torch.tensor([math.nan])) == {"count": 1, "not_finite": 1, "min": None, "max": None, "mean": None}
