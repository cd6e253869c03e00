"""Estimators as a command line names them: `NAME:KEY=VALUE,...`, each a configuration of its own. No torch."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ebft_mega.config.load import load_config
from ebft_mega.config.overrides import replace_overrides
from ebft_mega.config.schema import EbftConfig, RunConfig
from ebft_mega.errors import InputError, InputProblems, Problem
from ebft_mega.registry.kinds import ADVANTAGE_ESTIMATORS

OPTION = "--estimators"
SHORT_KEYS = {
    "n": "n_samples_per_prompt",
    "G": "generate_max_len",
    "T": "temperature",
    "pooling": "embed_method",
}
# For the comparison alone (`other_baselines.py`): baselines on the rollouts of `rloo`.
OPTIMAL_TOKEN_BASELINE, PREFIX_VALUES = "optimal_token_baseline", "prefix_values"
OTHERS = (OPTIMAL_TOKEN_BASELINE, PREFIX_VALUES)
# Keys in which estimators of one gradient may differ: how it is estimated, not what it is the gradient of.
HOW = ("advantage_estimator", "n_samples_per_prompt", "merge_equal_prefixes", "ce_coef", "entropy_coef")


@dataclass(frozen=True)
class EstimatorSpec:
    """An estimator of the policy gradient with its settings."""

    label: str  # as it was named
    name: str  # of an entry of `ebft.advantage_estimator`, or of `OTHERS`
    config: RunConfig  # of a run that uses it

    @cached_property
    def gradient(self) -> tuple[tuple[str, str], ...]:
        """What it estimates: all settings that do not belong to the estimator itself."""
        ebft = self.config.ebft.model_dump(mode="json")
        if not self.config.ebft.use_whitening:
            del ebft["whitening"]
        return tuple((name, str(value)) for name, value in ebft.items() if name not in HOW)

    @cached_property
    def cell(self) -> tuple[tuple[str, str], ...]:
        """As `gradient`, but for what becomes of the features: estimators of a cell are compared."""
        choices = ("alignment", "use_whitening", "whitening")
        return tuple(setting for setting in self.gradient if setting[0] not in choices)

    @property
    def settings(self) -> dict[str, Any]:
        """For the written figures."""
        ebft = self.config.ebft.model_dump(mode="json")
        return {"estimator": self.name, "ebft": ebft, "options": self.config.options.get(self.name, {})}


def read_specs(texts: Sequence[str], path: Path, overrides: Sequence[str]) -> tuple[EstimatorSpec, ...]:
    """Read what a command line asks for.

    Args:
        texts: the estimators.
        path: configuration that holds all settings which they do not name.
        overrides: `key=value` texts for all of them.
    Raises:
        InputError: everything that is wrong with the estimators, at once.
        ConfigError: the configuration by itself is wrong.
    """
    load_config(path, overrides)  # its own problems first; and it registers the entries of plugins
    problems: list[Problem] = []
    found: list[EstimatorSpec] = []
    for text in texts:
        try:
            found.append(_spec(text, path, overrides))
        except InputProblems as error:
            problems += [problem.within(f"{OPTION} {text}") for problem in error.problems]
    for label in {text for text in texts if texts.count(text) > 1}:
        problems.append(Problem("command line", OPTION, f"{label} twice", "each estimator once"))
    if problems:
        raise InputError(problems)
    return tuple(found)


def references(specs: Sequence[EstimatorSpec]) -> list[int]:
    """Of each estimator the one that it is compared with: the first of its cell."""
    cells = [spec.cell for spec in specs]
    return [cells.index(cell) for cell in cells]


def expanded_specs(texts: Sequence[str], choices: Mapping[str, Sequence[object] | None]) -> tuple[str, ...]:
    """Every estimator with every choice of settings that it does not name itself.

    Args:
        choices: by the short name of a key its values; None: that of the configuration.
    """
    found = list(texts)
    for name, values in choices.items():
        if values:
            found = [each for text in found for each in _with_choices(text, name, values)]
    return tuple(found)


def _with_choices(text: str, name: str, values: Sequence[object]) -> Iterator[str]:
    _, settings = _parts(text)
    if name in settings or SHORT_KEYS[name] in settings:
        yield text
        return
    for value in values:
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        yield f"{text}{',' if settings else ':'}{name}={shown}"


def _spec(text: str, path: Path, overrides: Sequence[str]) -> EstimatorSpec:
    name, settings = _parts(text)
    known = [*ADVANTAGE_ESTIMATORS.names(), *OTHERS]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise InputError([Problem("estimator", "NAME", name, f"one of {', '.join(known)}", near[0] if near else "")])
    entry = "rloo" if name in OTHERS else name
    own = {"ebft.advantage_estimator": entry} | {_key(key, entry): value for key, value in settings.items()}
    config = load_config(path, replace_overrides(overrides, [f"{key}={value}" for key, value in own.items()]))
    if name in OTHERS:
        _require_plain_objective(config, name)
    return EstimatorSpec(text, name, config)


def _parts(text: str) -> tuple[str, dict[str, str]]:
    """Name and settings of an estimator.

    Raises:
        InputError: a setting is not KEY=VALUE, or is given twice.
    """
    name, _, rest = text.partition(":")
    settings: dict[str, str] = {}
    for part in re.split(r",(?![^\[{]*[\]}])", rest) if rest else ():
        key, separator, value = part.partition("=")
        if not (key and separator and value) or key in settings:
            found = f"{key} twice" if key in settings else repr(part)
            raise InputError([Problem("estimator", name, found, "NAME:KEY=VALUE,KEY=VALUE with different keys")])
        settings[key] = value
    return name, settings


def _key(key: str, entry: str) -> str:
    """The dotted key that a setting of an estimator stands for."""
    options = ADVANTAGE_ESTIMATORS.entry(entry).Options.model_fields
    leaf = SHORT_KEYS.get(key, key)
    if leaf in EbftConfig.model_fields and leaf != "advantage_estimator":
        return f"ebft.{leaf}"
    if key in options:
        return f"options.{entry}.{key}"
    known = [*SHORT_KEYS, *(name for name in EbftConfig.model_fields if name != "advantage_estimator"), *options]
    near = difflib.get_close_matches(key, known, n=1)
    of_entry = ", ".join(options) or "it has none"
    expected = f"{', '.join(SHORT_KEYS)}, a key of the section ebft, or an option of {entry}: {of_entry}"
    raise InputError([Problem("estimator", "KEY", key, expected, near[0] if near else "")])


def _require_plain_objective(config: RunConfig, name: str) -> None:
    """Refuse what the other baselines are not written for."""
    ebft, problems = config.ebft, []
    if ebft.use_whitening:
        problems.append(Problem("estimator", "ebft.use_whitening", "true", f"false, with {name}"))
    if ebft.alignment != "inner_product":
        problems.append(Problem("estimator", "ebft.alignment", ebft.alignment, f"inner_product, with {name}"))
    if ebft.n_samples_per_prompt < 3:
        found = str(ebft.n_samples_per_prompt)
        problems.append(Problem("estimator", "ebft.n_samples_per_prompt", found, f"at least 3, with {name}"))
    if ebft.reward_terms:
        found = ", ".join(ebft.reward_terms)
        problems.append(Problem("estimator", "ebft.reward_terms", found, f"none, with {name}"))
    if problems:
        raise InputError(problems)
