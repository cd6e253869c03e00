"""Plugins that a checkpoint lists are compared with those in use, and never imported."""

import json
from pathlib import Path

import pytest

from ebft_mega.checkpoint.plugin_changes import plugin_changes
from ebft_mega.checkpoint.saved_run import SavedRun, read_run
from ebft_mega.errors import BrokenCheckpointError
from ebft_mega.registry.plugin_records import plugin_records
from ebft_mega.registry.plugins import use_plugins
from ebft_mega.runtime.run_files import describe_environment
from tests.unit.checkpoint.folder_stand_ins import relist, write_checkpoint

PLUGIN = """\
from ebft_mega.extension.learning_rate_schedule import LearningRateSchedule

open(__file__ + ".ran", "w").close()


class Flat(LearningRateSchedule):
    name = "flat"

    def factor(self, progress):
        return 1.0
"""


@pytest.fixture(autouse=True)
def no_plugins_afterwards():
    yield
    use_plugins([], Path(), {})


def saved(root: Path, environment: object) -> SavedRun:
    """A checkpoint with an `environment.json`."""
    folder = write_checkpoint(root, 20)
    relist(folder, "environment.json", json.dumps(environment).encode())
    return read_run(folder)


def test_what_a_checkpoint_lists_is_compared_and_never_imported(tmp_path: Path) -> None:
    path = tmp_path / "flat.py"
    path.write_text(PLUGIN)
    used = use_plugins(["flat.py"], tmp_path, {})
    environment = describe_environment(used)
    checkpoint = saved(tmp_path / "checkpoints", environment)
    assert environment["plugins"] == [plugin_records(used)[0].model_dump()]
    assert plugin_changes(checkpoint, used) == []
    Path(f"{path}.ran").unlink()
    use_plugins([], tmp_path, {})
    (note,) = plugin_changes(checkpoint, ())
    assert note == f"the plugin {path} (sha256 {used[0].sha256[:12]}) of the checkpoint is not in use any more"
    assert not Path(f"{path}.ran").exists()
    path.write_text(PLUGIN.replace("1.0", "0.5"))
    (note,) = plugin_changes(checkpoint, use_plugins(["flat.py"], tmp_path, {}))
    assert note.startswith(f"the code of the plugin {path} is another one than at the checkpoint: sha256 ")


def test_a_checkpoint_of_before_there_were_plugins_has_none(tmp_path: Path) -> None:
    assert plugin_changes(saved(tmp_path / "checkpoints", {"packages": {}}), ()) == []


@pytest.mark.parametrize("plugins", [5, [5], [{"name": "a"}], [{"name": "a", "file": "b", "sha256": "c"}], {"a": 1}])
def test_a_list_that_is_none_is_a_broken_checkpoint(tmp_path: Path, plugins: object) -> None:
    checkpoint = saved(tmp_path / "checkpoints", {"plugins": plugins})
    with pytest.raises(BrokenCheckpointError, match=r"environment\.json: plugins: found"):
        plugin_changes(checkpoint, ())
