"""Collectives of one tensor, with torch's current names and with those of older releases."""

import warnings

import pytest
import torch
import torch.distributed as dist

from ebft_mega.parallel.collectives import all_gather_single, reduce_scatter_single

CASES = [
    (all_gather_single, "all_gather_single", "all_gather_into_tensor"),
    (reduce_scatter_single, "reduce_scatter_single", "reduce_scatter_tensor"),
]


@pytest.mark.parametrize(("collective", "name", "old_name"), CASES, ids=[name for _, name, _ in CASES])
def test_the_current_name_is_called_without_a_warning(collective, name, old_name, groups):
    values, result = torch.arange(6.0).view(2, 3), torch.empty(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collective(result, values, groups.alone)
    assert torch.equal(result, values)


@pytest.mark.parametrize(("collective", "name", "old_name"), CASES, ids=[name for _, name, _ in CASES])
def test_releases_with_the_old_names_alone_work(collective, name, old_name, groups, monkeypatch):
    if hasattr(dist, name):
        new = getattr(dist, name)
        monkeypatch.setattr(dist, old_name, lambda result, values, group: new(result, values, group=group))
        monkeypatch.delattr(dist, name)
    values, result = torch.arange(6.0).view(2, 3), torch.empty(2, 3)
    collective(result, values, groups.alone)
    assert torch.equal(result, values)
