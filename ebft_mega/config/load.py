"""Load a YAML file and `--set` overrides as a `RunConfig`, or raise all problems at once."""

import dataclasses
import difflib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from ebft_mega.config.axolotl_keys import AXOLOTL, SIMILAR, foreign_key, our_name
from ebft_mega.config.fields import allowed_text, registry_of, yaml_text
from ebft_mega.config.overrides import OVERRIDE, apply_overrides
from ebft_mega.config.paths import put_in_places
from ebft_mega.config.rules import broken_rules, refusal_reason
from ebft_mega.config.schema import SECTIONS, RunConfig, all_keys, path_keys
from ebft_mega.config.yaml_source import MAX_TEXT_BYTES, read_yaml, write_yaml
from ebft_mega.errors import ConfigError, InputError, Problem
from ebft_mega.extension.options import Section
from ebft_mega.io.input_errors import read_input_bytes
from ebft_mega.shown_text import without_secrets

MAX_SHOWN_TEXT = 60
MAX_SHOWN_PATH = 200
MAX_EXPLAINED = 100  # problems of one section; each takes a search for what may have been meant
# Values for required keys that are missing or wrong, so that everything else can still be checked.
_STAND_INS: dict[str, Any] = {"output_dir": "unset", "sequence_length": 2}
_ONE_OF = "one of the keys of"  # a section, and a list
_NOTHING = "nothing"  # where a required key is missing
_SLIP = 0.9  # so near to a key of its section, a name means that one
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
    config, found = _build(tree)
    unplaced += found
    config = config.with_places(places | {"": str(path)})
    problems += [dataclasses.replace(problem, where=config.place(problem.key)) for problem in unplaced]
    if problems:
        raise ConfigError([*_from_axolotl(tree, path), *_lists_once(sorted(problems, key=_line_order))])
    return config


def _line_order(problem: Problem) -> tuple[bool, bool, int]:
    """Problems in the order of the file's lines, those of overrides after them, and last what is missing."""
    line = problem.where.rpartition(":")[2]
    is_missing = problem.found == _NOTHING or problem.found.startswith("neither ")
    return is_missing, problem.where == OVERRIDE, int(line) if line.isdigit() else 0


def _lists_once(problems: Sequence[Problem]) -> Iterator[Problem]:
    """The keys of a section are listed at the first key that is none of them."""
    listed = set()
    for problem in problems:
        keys, separator, _ = problem.expected.partition(": ")
        if separator and keys.startswith(_ONE_OF):
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


def nearest_key(wrong: str, keys: Iterable[str] | None = None) -> str:
    """Guess the valid dotted key that a wrong one means; empty when nothing is near.

    A key of the same section comes first, then the same name in another section, then a similar name there.
    """
    valid = list(all_keys() if keys is None else keys)
    section, _, leaf = wrong.rpartition(".")
    if (ours := our_name(leaf)) in valid:
        return ours
    siblings = [key for key in valid if key.rpartition(".")[0] == section]
    leaves = {key.rpartition(".")[2]: key for key in reversed(valid)}
    names = {key.rpartition(".")[2]: key for key in siblings}
    if not section:
        names |= {name: name for name in SECTIONS}
    for candidates, cutoff in ((names, 0.75), (leaves, 1.0), (names, SIMILAR), (leaves, 0.75)):
        near = difflib.get_close_matches(leaf, candidates, n=1, cutoff=cutoff)
        if near:
            return candidates[near[0]]
    return ""


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
    raise ConfigError([Problem(f"{path}:1", "(file)", _describe(source.value), "a mapping of sections")])


def _inherit_defaults(tree: dict[str, Any], places: Mapping[str, str]) -> list[Problem]:
    """Let an empty section mean its defaults; refuse a section that is no mapping."""
    problems = []
    for name, section in SECTIONS.items():
        if tree.get(name) is None:
            tree[name] = {}
        elif not isinstance(tree[name], dict):
            keys = ", ".join(section.model_fields)
            found = _describe(tree[name])
            problems.append(Problem(places.get(name, OVERRIDE), name, found, f"a section with the keys {keys}"))
            tree[name] = {}
    return problems


def _build(tree: Mapping[str, Any]) -> tuple[RunConfig, list[Problem]]:
    """The configuration, or as much of it as is valid, with all problems (`where` empty).

    Each section is checked by itself and without its refused keys, so that one mistake hides no other one.
    """
    problems: list[Problem] = []
    values: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        values[name], found = _valid_part(section, tree[name], f"{name}.")
        problems += found
    top = {name: value for name, value in tree.items() if name not in SECTIONS} | values
    config, found = _valid_part(RunConfig, top, "")
    problems += found
    # A key inside a mapping such as data.sources takes the whole mapping with it.
    refused = frozenset(".".join(problem.key.split(".")[:2]) for problem in problems) | {p.key for p in problems}
    return config, problems + broken_rules(config, refused)


def _valid_part(section: type[Section], values: Mapping[str, Any], prefix: str) -> tuple[Any, list[Problem]]:
    """A section built from its valid keys (others get their default), and a problem for each other key."""
    try:
        return section.model_validate(dict(values)), []
    except ValidationError as error:
        details = error.errors(include_url=False)
    explained = [
        _explain(section, prefix, tuple(map(str, item["loc"])), item["type"], values)
        for item in details[:MAX_EXPLAINED]
    ]
    problems = {problem.key: problem for problem in reversed(explained)}
    wrong = {str(item["loc"][0]) for item in details}
    good = {name: value for name, value in values.items() if name not in wrong}
    required = {name: value for name, value in _STAND_INS.items() if name in wrong and name in section.model_fields}
    found = list(reversed(problems.values()))
    if len(details) > MAX_EXPLAINED:
        more = f"{len(details) - MAX_EXPLAINED} more wrong keys and values"
        found.append(Problem("", prefix.rstrip(".") or "(file)", more, f"at most {len(section.model_fields)} keys"))
    return section.model_validate(required | good), found


def _explain(
    section: type[Section], prefix: str, place: tuple[str, ...], kind: str, values: Mapping[str, Any]
) -> Problem:
    """Put one pydantic error into words.

    Args:
        place: path of the value within the section; kind: pydantic's name of what is wrong with it.
    """
    name = place[0]
    key = prefix + name
    if kind == "extra_forbidden" and len(place) == 1:
        return _unknown_key(section, key, values[name])
    field = section.model_fields[name]
    if name not in values:
        return Problem("", key, _NOTHING, f"{allowed_text(field)} (this key is required)")
    inner = _section_of_values(field.annotation)
    if inner is not None and len(place) > 2 and isinstance(values[name][place[1]], Mapping) and place[2] != "[key]":
        return _explain(inner, f"{key}.{place[1]}.", place[2:], kind, values[name][place[1]])
    if inner is not None and len(place) > 1:
        value, expected = values[name][place[1]], f"a section with the keys {', '.join(inner.model_fields)}"
        if place[-1] == "[key]":
            value, expected = place[1], "a name of letters, digits, _ and -, a letter first"
        return Problem("", f"{key}.{place[1]}", _describe(value), expected)
    registry = registry_of(field)
    choices = list(registry.names()) if registry else [str(choice) for choice in get_args(field.annotation)]
    near = difflib.get_close_matches(str(values[name]), choices, n=1) if isinstance(values[name], str) else []
    return Problem("", key, _describe(values[name]), allowed_text(field), near[0] if near else "")


def _section_of_values(annotation: Any) -> type[Section] | None:
    """The section that a key maps names to (`data.sources`); None for every other kind of key."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_of_values(part))), None)


def _unknown_key(section: type[Section], key: str, value: Any) -> Problem:
    reason = refusal_reason(key.rpartition(".")[2])
    if reason:
        return Problem("", key, _describe(value), f"no such key: {reason}")
    leaf = key.rpartition(".")[2]
    foreign = foreign_key(key) or foreign_key(leaf)
    is_ours = leaf in {each.rpartition(".")[2] for each in all_keys()}
    is_slip = bool(difflib.get_close_matches(leaf, section.model_fields, n=1, cutoff=_SLIP))
    if foreign is not None and (foreign.ours or not is_ours) and not is_slip:
        return Problem("", key, f"a key of {foreign.program} (value {_describe(value)})", foreign.meaning)
    holder = "the file" if section is RunConfig else key.rpartition(".")[0]
    expected = f"{_ONE_OF} {holder}: {', '.join(section.model_fields)}"
    known = [*all_keys(), *(f"{holder}.{name}" for name in section.model_fields if section is not RunConfig)]
    return Problem("", key, f"an unknown key (value {_describe(value)})", expected, nearest_key(key, known))


def _describe(value: Any) -> str:
    """A value and its kind, as the file has it."""
    if isinstance(value, str):
        value = without_secrets(value)  # before it is cut, which could take the end of a password away
        longest = MAX_SHOWN_PATH if "/" in value else MAX_SHOWN_TEXT
        return repr(value if len(value) <= longest else f"{value[: longest - 3]}...")
    text = yaml_text(value) if value is None or isinstance(value, bool | int | float) else without_secrets(repr(value))
    return text if len(text) <= MAX_SHOWN_TEXT else f"{text[: MAX_SHOWN_TEXT - 3]}..."
