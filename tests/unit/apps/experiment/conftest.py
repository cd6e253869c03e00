"""Experiments without real runs."""

import pytest

from tests.unit.apps.experiment.small_experiment import SmallExperiment


@pytest.fixture
def small(tmp_path):
    """An experiment of three arms that can be run within a second."""
    return SmallExperiment(tmp_path)
