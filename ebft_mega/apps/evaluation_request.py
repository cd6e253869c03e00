"""What `tools/evaluate.py` is asked for: models by name, temperatures, completion lengths, feature maps. No torch."""

import difflib
import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ebft_mega.block_plan import BlockPlan
from ebft_mega.config.rules import broken_rules
from ebft_mega.config.schema import EbftConfig, RunConfig
from ebft_mega.config.section_values import valid_part
from ebft_mega.config.yaml_source import read_yaml
from ebft_mega.errors import InputError, InputProblems, Problem
from ebft_mega.evaluation.conditions import TRAINED_FEATURES, Condition
from ebft_mega.io.arguments import path_argument, real_number, whole_number

COMMAND_LINE = "command line"
UNNAMED = ""  # the name of a model whose figures are written to the output directory itself
MAP_KEYS = ("embed_method", "feature_layers", "feature_norm", "feature_model")
T = TypeVar("T")
# Of a directory, too.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,63}")
_NAME_WORDS = "a name of letters, digits, spaces and ._+-, a letter or digit first"
_TAKEN = ("report.html", "comparison.json", "differences.png", "evaluation.json", "evaluation.png")


@dataclass(frozen=True)
class MapChoice:
    """A feature map to look at completions with."""

    name: str
    config: RunConfig  # of a run that is trained with it, but for the network
    directory: Path | None  # of its frozen network; None: that of the evaluation

    @property
    def words(self) -> str:
        """What it is, in the words of the configuration's keys."""
        ebft = self.config.ebft
        network = "" if self.directory is None else f" feature_model={self.directory}"
        layers = ", ".join(f"{layer:g}" for layer in ebft.feature_layers)
        return f"embed_method={ebft.embed_method} feature_layers=[{layers}] feature_norm={ebft.feature_norm}" + network


@dataclass(frozen=True)
class EvaluationGrid:
    """Under which conditions models are evaluated; those of the configuration are among them."""

    config: RunConfig  # geometry, sampling and features; n is that of the evaluation
    temperatures: tuple[float, ...]  # ascending
    lengths: tuple[int, ...]  # ascending
    maps: tuple[MapChoice, ...]  # the configuration's own first

    @classmethod
    def of(
        cls,
        config: RunConfig,
        temperatures: Sequence[float] = (),
        lengths: Sequence[int] = (),
        samples: int | None = None,
        maps: Sequence[MapChoice] = (),
    ) -> "EvaluationGrid":
        """Conditions beside those of a configuration.

        Args:
            samples: n; None: the configuration's.
        """
        ebft = config.ebft
        if samples is not None:
            config = config.model_copy(update={"ebft": ebft.model_copy(update={"n_samples_per_prompt": samples})})
        return cls(
            config,
            tuple(sorted({*temperatures, ebft.temperature})),
            tuple(sorted({*lengths, ebft.generate_max_len})),
            (MapChoice(TRAINED_FEATURES, config, None), *maps),
        )

    @property
    def own(self) -> Condition:
        """The configuration's condition."""
        return Condition(self.config.ebft.temperature, self.config.ebft.generate_max_len)

    @property
    def plan(self) -> BlockPlan:
        """Anchors of the longest completions; rows end where whole blocks do."""
        ebft, longest = self.config.ebft, self.lengths[-1]
        room = self.config.data.sequence_length - longest - ebft.context_length
        return BlockPlan(
            sequence_length=self.config.data.sequence_length - room % ebft.stride,
            stride=ebft.stride,
            context_length=ebft.context_length,
            generate_length=longest,
            num_samples=ebft.n_samples_per_prompt,
        )


class Findings:
    """Problems of a command line, found one after another."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def refuse(self, key: str, found: str, expected: str, suggestion: str = "") -> None:
        """Note a problem."""
        self.problems.append(Problem(COMMAND_LINE, key, found, expected, suggestion))

    def attempt(self, check: Callable[[], T], key: str = "") -> T | None:
        """The result of a check, or None after its problems were noted, within an option if it is given."""
        try:
            return check()
        except InputProblems as error:
            self.problems += [problem.within(key) if key else problem for problem in error.problems]
            return None

    def require_none(self) -> None:
        """Raise what was found.

        Raises:
            InputError: anything was.
        """
        if self.problems:
            raise InputError(self.problems)


def read_models(texts: Sequence[str], findings: Findings) -> dict[str, Path]:
    """Models by name, from texts `NAME=PATH`; one alone may be a path.

    A text with `=` is a path where there is such a file, or where `/` or `~` comes first.
    """
    models: dict[str, Path] = {}
    for text in texts:
        name, path = _name_and_path(text)
        if name == UNNAMED and len(texts) > 1:
            findings.refuse("--model", repr(text), "NAME=PATH for each of several models")
        elif name != UNNAMED and not _NAME.fullmatch(name):
            findings.refuse("--model", repr(name), _NAME_WORDS)
        elif name in _TAKEN:
            findings.refuse("--model", repr(name), "another name: a file beside the models' directories has this one")
        elif name in models:
            findings.refuse("--model", f"{name!r} twice", "different names")
        else:
            try:
                models[name] = path_argument(path)
            except ArgumentTypeError as error:
                findings.refuse("--model", repr(path), f"a path: {error}")
    return models


def _name_and_path(text: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    is_path = not separator or "/" in name or name.startswith("~") or Path(text).exists()
    return (UNNAMED, text) if is_path else (name, path)


def read_numbers(option: str, texts: Sequence[str] | None, kind: type[T], findings: Findings) -> tuple[T, ...]:
    """Numbers of an option, each once, in their order: finite and above 0.

    Args:
        kind: int or float.
    """
    read: Callable[[str], Any] = whole_number() if kind is int else real_number(above=True)
    found: dict[T, None] = {}
    for text in texts or ():
        try:
            found[read(text)] = None
        except ArgumentTypeError as error:
            findings.refuse(option, repr(text), str(error).partition("expected ")[2])
    return tuple(found)


def check_lengths(config: RunConfig, lengths: Sequence[int], findings: Findings) -> None:
    """Refuse completions that rows have no room for."""
    most = config.data.sequence_length - config.ebft.context_length
    for length in lengths:
        if length > most:
            rows = f"rows of {config.data.sequence_length} tokens and a context of {config.ebft.context_length}"
            findings.refuse("--completion-lengths", str(length), f"at most {most}: {rows} leave no anchor for more")


def read_maps(groups: Sequence[Sequence[str]], config: RunConfig, findings: Findings) -> tuple[MapChoice, ...]:
    """Feature maps from groups `NAME KEY=VALUE ...`; what is not given is as in the configuration."""
    maps: dict[str, MapChoice] = {}
    for name, *settings in groups:
        option = f"--feature-map {name}"
        if not _NAME.fullmatch(name):
            findings.refuse("--feature-map", repr(name), _NAME_WORDS)
        elif name in maps or name == TRAINED_FEATURES:
            found = "the name of the configuration's own" if name == TRAINED_FEATURES else f"{name!r} twice"
            findings.refuse("--feature-map", found, "different names")
        elif not settings:
            findings.refuse(option, "no KEY=VALUE", f"at least one of {', '.join(MAP_KEYS)}")
        before = len(findings.problems)
        values = _map_values(option, settings, findings)
        directory = None
        if (place := values.pop("feature_model", None)) is not None:
            try:
                directory = path_argument(str(place))
            except ArgumentTypeError as error:
                findings.refuse(f"{option} feature_model", repr(place), f"a path: {error}")
        own = _with_map(option, values, config, findings)
        if len(findings.problems) == before:
            maps[name] = MapChoice(name, own, directory)
    return tuple(maps.values())


def _map_values(option: str, settings: Sequence[str], findings: Findings) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for text in settings:
        key, separator, written = text.partition("=")
        if not separator:
            findings.refuse(option, repr(text), "KEY=VALUE")
        elif key not in MAP_KEYS:
            near = difflib.get_close_matches(key, MAP_KEYS, n=1)
            findings.refuse(option, key, f"one of {', '.join(MAP_KEYS)}", near[0] if near else "")
        elif key in values:
            findings.refuse(option, f"{key} twice", "every key once")
        else:
            source = read_yaml(written, option)
            findings.problems += [replace(problem, where=COMMAND_LINE, key=option) for problem in source.problems]
            values[key] = source.value
    return values


def _with_map(option: str, values: Mapping[str, Any], config: RunConfig, findings: Findings) -> RunConfig:
    """The configuration with another feature map; weights of its layers do not outlive other layers."""
    tree = config.ebft.model_dump(mode="json") | dict(values)
    if "feature_layers" in values:
        tree["layer_weights"] = None
    ebft, problems = valid_part(EbftConfig, tree, "ebft.")
    changed = config.model_copy(update={"ebft": ebft})
    known = broken_rules(config)
    problems += [problem for problem in broken_rules(changed) if not problems and problem not in known]
    findings.problems += [replace(problem, where=f"{COMMAND_LINE}: {option}") for problem in problems]
    return changed


def anchor_notes(grid: EvaluationGrid) -> list[str]:
    """What the conditions leave out of rows."""
    plan, whole = grid.plan, grid.config.block_plan
    if plan.num_blocks == whole.num_blocks:
        return []
    return [
        f"anchors are those of completions of {plan.generate_length} tokens: {plan.num_blocks} of a row's "
        f"{whole.num_blocks}, for all lengths."
    ]
