"""Load a YAML file and `--set` overrides as a `RunConfig`, or raise all problems at once."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ebft_mega.config.axolotl.axolotl_keys import AXOLOTL, foreign_key
from ebft_mega.config.entries import entries_in_use
from ebft_mega.config.overrides import OVERRIDE, apply_overrides
from ebft_mega.config.paths import put_in_places
from ebft_mega.config.plugin_keys import given_options, load_plugins, names_an_entry, with_options
from ebft_mega.config.rules import broken_rules
from ebft_mega.config.schema import SECTIONS, RunConfig, path_keys
from ebft_mega.config.section_values import NOTHING, ONE_OF, OPTIONS, describe, valid_part
from ebft_mega.config.yaml_source import MAX_TEXT_BYTES, read_yaml, write_yaml
from ebft_mega.errors import ConfigError, InputError, PluginError, Problem
from ebft_mega.io.input_errors import read_input_bytes
from ebft_mega.registry.plugin_sources import KEY

_WHOLE_FILE = 3  # so many keys of axolotl, and the file is one of axolotl's


def load_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> RunConfig:
    """Read and check a configuration.

    Args:
        path: the YAML file.
        overrides: `section.key=value` texts, each for another key; the value is read as YAML.
    Returns:
        The configuration; `place(key)` tells where each key was written.
    Raises:
        ConfigError: everything that is wrong, each with file and line, key, value and what is allowed.
    """
    path = Path(path).absolute()
    tree, places, problems = _read_file(path)
    problems += apply_overrides(tree, places, overrides)
    problems += _inherit_defaults(tree, places)
    unplaced = put_in_places(tree, path_keys(), os.environ)
    plugins, of_plugins = load_plugins(tree, places, path)
    problems += of_plugins
    # With names that are no list nothing was imported; the schema says so.
    entries_are_missing = bool(of_plugins) or not isinstance(tree.get(KEY, []), list)
    config, found = _build(tree, entries_are_missing)
    unplaced += found
    config = config.with_places(places | {"": str(path)}).with_plugins(plugins)
    # What an entry needs and nobody has given is missed where the entry is named.
    named = {f"{OPTIONS}.{use.name}": config.place(use.key) for use in entries_in_use(config)}
    config = config.with_places(named | places | {"": str(path)})
    problems += [dataclasses.replace(problem, where=config.place(problem.key)) for problem in unplaced]
    if problems:
        kind = PluginError if of_plugins else ConfigError
        raise kind([*_from_axolotl(tree, path), *_lists_once(sorted(problems, key=_line_order))])
    return config


def _line_order(problem: Problem) -> tuple[bool, bool, int]:
    """Problems in the order of the file's lines, those of overrides after them, and last what is missing."""
    line = problem.where.rpartition(":")[2]
    is_missing = problem.found == NOTHING or problem.found.startswith("neither ")
    return is_missing, problem.where == OVERRIDE, int(line) if line.isdigit() else 0


def _lists_once(problems: Sequence[Problem]) -> Iterator[Problem]:
    """The keys of a section are listed at the first key that is none of them."""
    listed = set()
    for problem in problems:
        keys, separator, _ = problem.expected.partition(": ")
        if separator and keys.startswith(ONE_OF):
            if keys in listed:
                problem = dataclasses.replace(problem, expected=f"{keys}, see above")
            listed.add(keys)
        yield problem


def _from_axolotl(tree: Mapping[str, Any], path: str | os.PathLike[str]) -> Iterator[Problem]:
    """Say how a whole file of axolotl becomes one of this trainer."""
    own = set(RunConfig.model_fields)
    foreign = [name for name in tree if name not in own and (key := foreign_key(name)) and key.program == AXOLOTL]
    if len(foreign) >= _WHOLE_FILE:
        expected = "those of this trainer, which python tools/import_axolotl.py --input FILE --output NEW makes of it"
        yield Problem(str(path), "(file)", f"{len(foreign)} keys of axolotl", expected)


def resolved_yaml(config: RunConfig) -> str:
    """Write the configuration with every key as YAML, which `load_config` reads back unchanged."""
    return write_yaml(config.model_dump(mode="json"))


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, str], list[Problem]]:
    """The tree of the file, the place of every key, and what is wrong with the text."""
    try:
        text = read_input_bytes(path, "a YAML file", MAX_TEXT_BYTES).decode("utf-8")
    except InputError as error:
        raise ConfigError([dataclasses.replace(problem, key="(file)") for problem in error.problems]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([Problem(str(path), "(file)", f"{error.reason} at byte {error.start}", "UTF-8")]) from None
    source = read_yaml(text, str(path))
    places = {key: f"{path}:{line}" for key, line in source.lines.items()}
    if source.value is None or isinstance(source.value, dict):
        if source.problems and source.value is None:  # not YAML at all: nothing else can be said
            raise ConfigError(source.problems)
        return source.value or {}, places, source.problems
    raise ConfigError([Problem(f"{path}:1", "(file)", describe(source.value), "a mapping of sections")])


def _inherit_defaults(tree: dict[str, Any], places: Mapping[str, str]) -> list[Problem]:
    """Let an empty section mean its defaults; refuse a section that is no mapping."""
    problems = []
    for name, section in SECTIONS.items():
        if tree.get(name) is None:
            tree[name] = {}
        elif not isinstance(tree[name], dict):
            keys = ", ".join(section.model_fields)
            found = describe(tree[name])
            problems.append(Problem(places.get(name, OVERRIDE), name, found, f"a section with the keys {keys}"))
            tree[name] = {}
    return problems


def _build(tree: Mapping[str, Any], entries_are_missing: bool) -> tuple[RunConfig, list[Problem]]:
    """The configuration, or as much of it as is valid, with all problems (`where` empty).

    Each section is checked by itself and without its refused keys, so that one mistake hides no other one.

    Args:
        entries_are_missing: a plugin could not be used, so that names may be right that are not known.
    """
    problems: list[Problem] = []
    values: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        values[name], found = valid_part(section, tree[name], f"{name}.")
        problems += found
    top = {name: value for name, value in tree.items() if name not in SECTIONS} | values
    given = dict(given_options(tree))
    if isinstance(top.get(OPTIONS), dict):
        top[OPTIONS] = {name: value for name, value in given.items() if isinstance(value, dict)}
    config, found = valid_part(RunConfig, top, "")
    problems += found
    # A key inside a mapping such as data.sources takes the whole mapping with it.
    refused = {".".join(problem.key.split(".")[:2]) for problem in problems} | {p.key for p in problems}
    if entries_are_missing:
        refused |= {OPTIONS}
        problems = [problem for problem in problems if not names_an_entry(problem.key)]
    else:
        config, found = with_options(config, given, frozenset(problem.key for problem in problems))
        refused |= {OPTIONS} if found else set()
        problems += found
    return config, problems + broken_rules(config, frozenset(refused))
