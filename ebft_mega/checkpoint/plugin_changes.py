"""Which plugins a checkpoint was written with, compared with those in use. Nothing is imported for it. No torch."""

from collections.abc import Sequence

from ebft_mega.checkpoint.manifest import read_listed
from ebft_mega.checkpoint.saved_run import SavedRun
from ebft_mega.errors import BrokenCheckpointError
from ebft_mega.io.json_text import parse_json
from ebft_mega.io.parse_boundary import reading
from ebft_mega.registry.plugin_records import PluginRecord, changed_plugins, plugin_records
from ebft_mega.registry.plugins import Plugin
from ebft_mega.runtime.run_files import ENVIRONMENT_NAME


def plugin_changes(saved: SavedRun, plugins: Sequence[Plugin]) -> list[str]:
    """Notes on plugins that are gone, new or changed since a checkpoint: a run that resumes may do so.

    Raises:
        BrokenCheckpointError: what the checkpoint says of its plugins cannot be read.
    """
    content = read_listed(saved.directory, saved.manifest, ENVIRONMENT_NAME)
    expected = "a list of plugins, each with name, file and sha256"
    with reading(saved.directory / ENVIRONMENT_NAME, "plugins", expected, BrokenCheckpointError):
        listed = parse_json(content.decode()).get("plugins", [])  # no such key before there were plugins
        then = [PluginRecord.model_validate(each) for each in listed]
    return list(changed_plugins(then, plugin_records(plugins)))
