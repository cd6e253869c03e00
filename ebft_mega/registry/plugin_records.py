"""Plugins in words and as records: for people, for the files of a run, and compared with a checkpoint's. No torch."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from ebft_mega.io.records import Record, Sha256
from ebft_mega.registry.plugins import Plugin

_SHORT_SHA256 = 12  # characters that tell two versions apart for people


class PluginRecord(Record):
    """Which code a plugin was."""

    name: str  # a module's name, or an absolute path
    file: str
    sha256: Sha256


def plugin_records(plugins: Sequence[Plugin]) -> tuple[PluginRecord, ...]:
    """The plugins in use, as `environment.json` and `run.json` have them."""
    return tuple(PluginRecord(name=plugin.resolved, file=str(plugin.file), sha256=plugin.sha256) for plugin in plugins)


def plugins_in_words(plugins: Sequence[Plugin]) -> str:
    """Name and hash of every plugin on one line, to be compared over ranks."""
    return ", ".join(f"{plugin.resolved} (sha256 {_short(plugin.sha256)})" for plugin in plugins) or "none"


def plugin_rows(plugins: Sequence[Plugin], options: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, object]]:
    """Rows of a table: each plugin, below it its entries, and below these their options; none without plugins.

    Args:
        options: of the entries in use, by their names.
    """
    rows: list[tuple[str, object]] = []
    for plugin in plugins:
        rows.append((plugin.name, f"{plugin.file}, sha256 {_short(plugin.sha256)}"))
        for entry in plugin.entries:
            rows.append((f"  {entry.kind} {entry.name}", entry.summary or f"(no docstring) {entry.place}"))
            rows += [(f"    {name}", str(value)) for name, value in options.get(entry.name, {}).items()]
    return rows


def slow_imports(plugins: Sequence[Plugin]) -> Iterator[str]:
    """Say which plugins make a dry run wait for torch."""
    for plugin in plugins:
        if plugin.loads_torch:
            yield (
                f"plugins: {plugin.name} imports torch, which a dry run waits for ({plugin.seconds:.1f} s in this "
                "process): import it inside methods."
            )


def changed_plugins(then: Sequence[PluginRecord], now: Sequence[PluginRecord]) -> Iterator[str]:
    """Say which plugins are not those that a checkpoint was written with; the same code elsewhere is the same.

    Args:
        then: those of the checkpoint; now: those in use.
    """
    old = [each for each in then if each.sha256 not in {other.sha256 for other in now}]
    for plugin in now:
        if plugin.sha256 in {other.sha256 for other in then}:
            continue
        same = [each for each in old if each.name == plugin.name]
        before = next(iter(same or [each for each in old if _file_name(each) == _file_name(plugin)]), None)
        if before is None:
            yield f"the plugin {plugin.name} (sha256 {_short(plugin.sha256)}) was not in use at the checkpoint"
            continue
        old.remove(before)
        yield (
            f"the code of the plugin {plugin.name} is another one than at the checkpoint: sha256 "
            f"{_short(before.sha256)} -> {_short(plugin.sha256)}"
        )
    for plugin in old:
        yield f"the plugin {plugin.name} (sha256 {_short(plugin.sha256)}) of the checkpoint is not in use any more"


def _file_name(plugin: PluginRecord) -> str:
    return PurePath(plugin.file).name


def _short(sha256: str) -> str:
    return sha256[:_SHORT_SHA256]
