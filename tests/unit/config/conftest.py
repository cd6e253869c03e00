"""How tests of single keys load a configuration."""

import pytest

from ebft_mega.config.load import load_config


@pytest.fixture
def load(tmp_path, request):
    """Load the `BASE` of the test's module with overrides."""
    path = tmp_path / "a.yaml"
    path.write_text(request.module.BASE)
    return lambda *overrides: load_config(path, overrides)
