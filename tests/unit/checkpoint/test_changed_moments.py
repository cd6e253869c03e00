"""A plugin's optimizer with other moments than those of a checkpoint: one message, not one a tensor."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from ebft_mega.checkpoint import tensors
from ebft_mega.errors import BrokenCheckpointError
from ebft_mega.extension.update_rule import Optimizer


class Renamed(Optimizer):
    """An optimizer whose moment has another name than it had."""

    name = "renamed"
    moments = ("speed",)


def test_other_moments_are_named(monkeypatch):
    monkeypatch.setattr(tensors, "optimizer", lambda config: Renamed())
    saved = SimpleNamespace(directory=Path("runs/a"), index=SimpleNamespace(kinds={"weights": {}, "velocity": {}}))
    config = SimpleNamespace(place=lambda key: "my.yaml:3")
    with pytest.raises(BrokenCheckpointError) as refused:
        tensors.check_state(saved, config, architecture=None)
    (problem,) = refused.value.problems
    assert problem.where == "my.yaml:3: runs/a" and problem.key == "train.optimizer"
    assert problem.found == "the moments velocity of another version of the optimizer renamed"
    assert problem.expected.startswith("speed, as ") and "test_changed_moments.py:" in problem.expected
