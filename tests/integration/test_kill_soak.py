"""Kills and signals at random moments, a start after each: nothing is lost, no process is left (`kill_soak.py`)."""

import pytest

from tests.integration.kill_soak import soak


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kills_and_signals_at_random_moments(tmp_path):
    assert soak(faults=12, seed=1, directory=tmp_path).problems == []
