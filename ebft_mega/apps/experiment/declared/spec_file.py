"""Read an experiment's file: its schema, with every problem's file and line, all at once. No torch."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from ebft_mega.apps.experiment.spec import (
    Arm,
    Comparison,
    EvaluationSection,
    ExperimentSpec,
    Preparation,
    Splits,
    Tuning,
)
from ebft_mega.config.fields import is_possible_path
from ebft_mega.config.section_values import MAX_EXPLAINED, describe, explain
from ebft_mega.config.yaml_source import MAX_TEXT_BYTES, read_yaml
from ebft_mega.errors import ConfigError, Problem
from ebft_mega.extension.options import Section
from ebft_mega.io.expanded_paths import REPOSITORY, PathTextError, expanded
from ebft_mega.io.input_errors import read_input_bytes
from ebft_mega.io.parse_boundary import reading

_SECTIONS: dict[str, type[Section]] = {"splits": Splits, "tuning": Tuning, "evaluation": EvaluationSection}
_LISTS: dict[str, type[Section]] = {"prepare": Preparation, "primary": Comparison, "secondary": Comparison}
_STAND_INS = {"train": "unset-train", "tuning": "unset-tuning", "report": "unset-report"}
S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class SpecFile:
    """An experiment's file, read."""

    path: Path
    spec: ExperimentSpec
    lines: Mapping[str, int] = field(default_factory=dict)  # of every dotted key

    def place(self, key: str) -> str:
        """File and line of a key, or of the section that it is missing in."""
        while key and key not in self.lines:
            key = key.rpartition(".")[0]
        return f"{self.path}:{self.lines[key]}" if key in self.lines else str(self.path)


def place_of(text: str) -> Path:
    """The absolute path that a text of the file means: `~` and variables are expanded, relative ones start at the root.

    Raises:
        PathTextError: something in it cannot be put in its place.
    """
    return Path(os.path.normpath(os.path.join(REPOSITORY, expanded(text, os.environ))))


def read_spec(path: Path, rules: Callable[[SpecFile], Iterator[Problem]]) -> SpecFile:
    """Read an experiment's file.

    Args:
        rules: what else is wrong with a file whose values are all of the right kind.
    Raises:
        ConfigError: everything that is wrong with it, each with file and line, key, value and what is allowed.
        InputError: it cannot be read.
    """
    content = read_input_bytes(path, "an experiment's YAML file", MAX_TEXT_BYTES)
    with reading(path, "(file)", "UTF-8"):
        text = content.decode("utf-8")
    source = read_yaml(text, str(path))
    if not isinstance(source.value, dict):
        found = [] if source.problems else [Problem(f"{path}:1", "(file)", describe(source.value), "a mapping of keys")]
        raise ConfigError([*source.problems, *found])
    spec, problems = _build(source.value)
    read = SpecFile(path, spec, source.lines)
    wrong = {problem.key for problem in problems}
    problems += [found for found in rules(read) if not _is_within(found.key, wrong)]
    problems = [replace(problem, where=problem.where or read.place(problem.key)) for problem in problems]
    if source.problems or problems:
        raise ConfigError([*source.problems, *sorted(problems, key=_line_of)])
    return read


def _is_within(key: str, wrong: set[str]) -> bool:
    return any(key == each or key.startswith(f"{each}.") or each.startswith(f"{key}.") for each in wrong)


def _line_of(problem: Problem) -> int:
    line = problem.where.rpartition(":")[2]
    return int(line) if line.isdigit() else 0


def _build(tree: Mapping[str, Any]) -> tuple[ExperimentSpec, list[Problem]]:
    """The file's values, stand-ins for what is wrong, and a problem for each of these."""
    problems: list[Problem] = []
    values = {name: value for name, value in tree.items() if value is not None}
    for name, kind in _SECTIONS.items():
        if name not in values:
            continue
        part, found = _part(kind, values[name], f"{name}.")
        problems += found
        values[name] = part or (Splits(**_STAND_INS) if kind is Splits else kind())
    for name, kind in _LISTS.items():
        if isinstance(values.get(name), list):
            parts = [_part(kind, item, f"{name}.{number}.") for number, item in enumerate(values[name])]
            problems += [problem for _, found in parts for problem in found]
            values[name] = tuple(part for part, _ in parts if part is not None)
    if isinstance(values.get("arms"), dict):
        arms = {str(name): _part(Arm, value or {}, f"arms.{name}.") for name, value in values["arms"].items()}
        problems += [problem for _, found in arms.values() for problem in found]
        values["arms"] = {name: part or Arm() for name, (part, _) in arms.items()}
    spec, found = _part(ExperimentSpec, values, "")
    problems += [replace(each, suggestion=each.suggestion.removeprefix("the file.")) for each in found]
    if spec is None:
        wrong = {problem.key.partition(".")[0] for problem in found}
        known = set(ExperimentSpec.model_fields) - wrong
        good = {name: value for name, value in values.items() if name in known}
        needed = {"question": "", "output_dir": "unset", "config": "unset", "splits": Splits(**_STAND_INS), "arms": {}}
        spec = ExperimentSpec.model_validate({**needed, **_tuples(good)})
    return spec, problems


def _part(kind: type[S], values: Any, prefix: str) -> tuple[S | None, list[Problem]]:
    """A section, or what is wrong with it."""
    if not isinstance(values, dict):
        expected = f"a section with the keys {', '.join(kind.model_fields)}"
        return None, [Problem("", prefix.rstrip("."), describe(values), expected)]
    try:
        return kind.model_validate(_tuples(values)), []
    except ValidationError as error:
        details = error.errors(include_url=False)[:MAX_EXPLAINED]
    found = [explain(kind, prefix, tuple(map(str, item["loc"])), item["type"], values) for item in details]
    return None, list({problem.key: problem for problem in found}.values())


def _tuples(value: Any) -> Any:
    """Lists as tuples, at every depth: values never change afterwards, and choices are compared and hashed."""
    if isinstance(value, dict):
        return {name: _tuples(inner) for name, inner in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def path_error(text: str) -> PathTextError | None:
    """What is wrong with a path's text, if anything is."""
    try:
        place = place_of(text)
    except PathTextError as error:
        return error
    try:
        str(place).encode()
        is_possible = bool(text) and "://" not in text and is_possible_path(str(place))
    except UnicodeEncodeError:
        is_possible = False
    return None if is_possible else PathTextError(describe(text), "a local path")
