"""The keys `plugins` and `options` of a file: what the first names is imported, the second is divided by entries."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ebft_mega.config.entries import entries_in_use, option_holder, read_options
from ebft_mega.config.fields import registry_of, registry_of_names
from ebft_mega.config.paths import paths_in
from ebft_mega.config.schema import RunConfig, all_keys, path_keys
from ebft_mega.config.section_values import MAX_EXPLAINED, OPTIONS, describe, explain
from ebft_mega.errors import ConfigError, Problem
from ebft_mega.extension.entry import Entry, place_of_entry
from ebft_mega.registry.plugin_sources import KEY
from ebft_mega.registry.plugins import Plugin, use_plugins

logger = logging.getLogger(__name__)


def load_plugins(
    tree: dict[str, Any], places: Mapping[str, str], file: Path
) -> tuple[tuple[Plugin, ...], list[Problem]]:
    """Import what a configuration names as plugins, and let the key hold what any folder can resolve.

    Nothing is imported from a place that another key of the configuration names.

    Args:
        tree: of the file, its paths absolute; it is changed.
        places: where each key was written.
        file: of the configuration; relative paths of plugins start in its folder.
    Returns:
        The plugins, and all problems. Where there are problems, entries may be missing.
    """
    names = tree.get(KEY)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        names = []  # the schema says what is wrong with anything else
    written = [places.get(f"{KEY}.{number}") or places.get(KEY) or str(file) for number in range(len(names))]
    forbidden = {Path(path): f"{key} of this configuration" for key, path in paths_in(tree, path_keys())}
    try:
        plugins = use_plugins(names, file.parent, forbidden, written)
    except ConfigError as error:
        return (), list(error.problems)
    if plugins:
        tree[KEY] = [plugin.resolved for plugin in plugins]
    return plugins, []


def names_an_entry(key: str) -> bool:
    """Whether a key takes the name of an entry, or stands below one whose keys are such names."""
    for name, field in all_keys().items():
        if name == key and registry_of(field) is not None:
            return True
        if f"{key}.".startswith(f"{name}.") and registry_of_names(field) is not None:
            return True
    return False


def given_options(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names below `options` with what stands there; an empty section means all defaults."""
    given = tree.get(OPTIONS)
    for name, values in given.items() if isinstance(given, dict) else ():
        yield str(name), {} if values is None else values


def with_options(
    config: RunConfig, given: Mapping[str, Any], refused: frozenset[str]
) -> tuple[RunConfig, list[Problem]]:
    """The configuration with all options of the entries in use, defaults filled in, and what is wrong with them.

    Args:
        given: by the entry's name.
        refused: keys with problems; what they name is not known.
    """
    uses = [use for use in entries_in_use(config) if not any(f"{use.key}.".startswith(f"{key}.") for key in refused)]
    needed = {use.name: use.key for use in uses if use.has_options}
    problems: list[Problem] = []
    options: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys([*given, *needed]):
        values, key = given.get(name, {}), f"{OPTIONS}.{name}"
        kind = option_holder(name, uses)
        if isinstance(kind, Problem):
            problems.append(kind)
        elif not isinstance(values, dict):
            expected = f"a section with the options of {name}: {', '.join(kind.Options.model_fields)}"
            problems.append(Problem("", key, describe(values), expected))
        else:
            found = list(wrong_options(kind, values, key, is_used=name in needed))
            problems += found
            options[name] = values if found else read_options(kind, values).model_dump(mode="json")
    return config.model_copy(update={OPTIONS: options}), problems


def wrong_options(kind: type[Entry], values: Mapping[str, Any], key: str, is_used: bool) -> Iterator[Problem]:
    """What an entry does not take of its options, by the schema that it declares and by itself.

    Args:
        values: as they were given.
        key: under which, for messages; `where` of the problems is empty.
        is_used: whether the entry is made with them to see.
    """
    try:
        read = read_options(kind, values)
        if is_used:
            kind(read)
    except ValidationError as error:
        for item in error.errors(include_url=False)[:MAX_EXPLAINED]:
            place = tuple(map(str, item["loc"]))
            if place and item["type"] not in ("value_error", "assertion_error"):
                yield explain(kind.Options, f"{key}.", place, item["type"], values)
            else:  # of a check of its own
                found = describe(values.get(place[0])) if place else describe(values)
                yield Problem("", ".".join([key, *place[:1]]), found, item["msg"])
    except Exception as error:  # of code that this program does not know
        logger.info("%s is refused", key, exc_info=error)
        said = f"{type(error).__name__}: {error}"
        found = f"{describe(values)}, at which {kind.__name__} ({place_of_entry(kind)}) ends with {said}"
        yield Problem("", key, found, "options that it takes")
