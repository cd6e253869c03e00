"""The entries that a configuration names, each with its options."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ebft_mega.config.fields import registry_of, registry_of_names
from ebft_mega.config.schema import RunConfig, all_keys
from ebft_mega.errors import Problem
from ebft_mega.extension.advantage_estimator import AdvantageEstimator
from ebft_mega.extension.entry import Entry
from ebft_mega.extension.feature_map import FeatureMap
from ebft_mega.extension.learning_rate_schedule import LearningRates
from ebft_mega.extension.options import Section
from ebft_mega.extension.reward_term import RewardTerm
from ebft_mega.extension.sampled_inputs import Need
from ebft_mega.extension.update_rule import Optimizer
from ebft_mega.registry.kinds import (
    ADVANTAGE_ESTIMATORS,
    ALL_REGISTRIES,
    FEATURE_MAPS,
    OPTIMIZERS,
    REWARD_TERMS,
    SCHEDULES,
)
from ebft_mega.registry.registry import Registry
from ebft_mega.reward.terms.alignment import Alignment

E = TypeVar("E", bound=Entry)


@dataclass(frozen=True)
class Use:
    """An entry that a configuration names."""

    key: str  # the dotted key that names it
    registry: Registry[Any]
    name: str

    @property
    def has_options(self) -> bool:
        """Whether the entry has any."""
        return has_options(self.registry, self.name)


def entries_in_use(config: RunConfig) -> Iterator[Use]:
    """List the entries that keys of a configuration name; those of kinds that no key names are not among them."""
    for key, field in all_keys().items():
        section, _, leaf = key.rpartition(".")
        value = getattr(getattr(config, section) if section else config, leaf)
        if (registry := registry_of(field)) is not None:
            yield Use(key, registry, value)
        if (registry := registry_of_names(field)) is not None:
            yield from (Use(f"{key}.{name}", registry, name) for name in value)


def kinds_without_a_key() -> tuple[Registry[Any], ...]:
    """The kinds whose entries no key names: a text's file or an address decides which of them are used."""
    fields = all_keys().values()
    named = {id(registry) for field in fields for registry in (registry_of(field), registry_of_names(field))}
    return tuple(registry for registry in ALL_REGISTRIES if id(registry) not in named)


def has_options(registry: Registry[Any], name: str) -> bool:
    """Whether an entry has options."""
    return bool(registry.entry(name).Options.model_fields)


def read_options(kind: type[Entry], values: Mapping[str, Any]) -> Section:
    """Read an entry's options as they stand in a configuration; lists may stand for tuples.

    Raises:
        pydantic.ValidationError: they are not what its `Options` says.
    """
    return kind.Options.model_validate_json(json.dumps(values))


def entry_of(config: RunConfig, registry: Registry[E], name: str) -> E:
    """The entry of a name with its options of a configuration, which `load_config` has checked."""
    kind = registry.entry(name)
    # An entry of another kind may have the name and the options.
    return kind(read_options(kind, config.options.get(name, {}) if kind.Options.model_fields else {}))


def option_holder(name: str, uses: Sequence[Use]) -> type[Entry] | Problem:
    """The entry to which the options below a name belong, or why there is none.

    Args:
        uses: the entries that the configuration names.
    """
    key = f"options.{name}"
    used = [use.registry for use in uses if use.name == name]
    known = [registry for registry in ALL_REGISTRIES if name in registry.names()]
    takers = [registry for registry in known if has_options(registry, name)]
    in_use = [registry for registry in takers if registry in used] or [
        registry for registry in takers if registry in kinds_without_a_key()
    ]
    if len(in_use) > 1:
        found = f"options of the {' and of the '.join(registry.kind for registry in in_use)} {name}"
        return Problem("", key, found, "entries of different names where both have options")
    if in_use or takers:
        return (in_use or takers)[0].entry(name)
    others = list(dict.fromkeys(use.name for use in uses if use.has_options))
    expected = (
        f"those of an entry in use that has any: {', '.join(others)}"
        if others
        else "no options: no entry in use has any"
    )
    if known:
        found = f"options of the {' and the '.join(registry.kind for registry in known)} {name}, which has none"
        return Problem("", key, found, expected)
    names = {name: None for registry in ALL_REGISTRIES for name in registry.names()}
    near = difflib.get_close_matches(name, [*others, *names], n=1)
    return Problem("", key, f"options of {name!r}, which is no entry", expected, f"options.{near[0]}" if near else "")


def idle_options(config: RunConfig) -> Iterator[str]:
    """Say which options change nothing, because no key names their entry."""
    used = {use.name for use in entries_in_use(config) if use.has_options}
    used |= {name for registry in kinds_without_a_key() for name in registry.names()}
    for name in config.options:
        kinds = [registry.kind for registry in ALL_REGISTRIES if name in registry.names()]
        if name not in used and kinds:
            yield f"options.{name} changes nothing: no key names the {' or the '.join(kinds)} {name}."


def advantage_estimator(config: RunConfig) -> AdvantageEstimator:
    """The entry of `ebft.advantage_estimator`."""
    return entry_of(config, ADVANTAGE_ESTIMATORS, config.ebft.advantage_estimator)


def uses_critic(config: RunConfig) -> bool:
    """Whether the run's estimator reads a token critic."""
    return config.uses_rollouts and "critic" in advantage_estimator(config).needs


def feature_map(config: RunConfig) -> FeatureMap:
    """The entry of `ebft.embed_method`."""
    return entry_of(config, FEATURE_MAPS, config.ebft.embed_method)


def tapped_fractions(config: RunConfig) -> tuple[float, ...]:
    """Depths at which the frozen network is read, as shares of its layers, ascending.

    Those of `ebft.feature_layers` that the feature map chooses.
    """
    return feature_map(config).layers(tuple(sorted(config.ebft.feature_layers)))


def learning_rates(config: RunConfig, total_steps: int | None = None) -> LearningRates:
    """The learning rate of every step, from the entry of `train.lr_scheduler`.

    Args:
        total_steps: of a run of another length; None: as the configuration says.
    """
    train, steps = config.train, config.total_steps if total_steps is None else total_steps
    return LearningRates(
        schedule=entry_of(config, SCHEDULES, train.lr_scheduler),
        peak=train.lr,
        lowest=train.min_lr,
        warmup_steps=train.warmup_of(steps),
        total_steps=steps,
    )


def optimizer(config: RunConfig) -> Optimizer:
    """The entry of `train.optimizer`."""
    return entry_of(config, OPTIMIZERS, config.train.optimizer)


def reward_terms(config: RunConfig) -> tuple[tuple[RewardTerm, float], ...]:
    """The terms of the reward with their coefficients: alignment, diversity (a penalty), then `ebft.reward_terms`."""
    ebft = config.ebft
    alignment = (Alignment(kind=ebft.alignment), ebft.alignment_coef)
    others = {"diversity": -ebft.diversity_coef} | ebft.reward_terms
    return (alignment, *((entry_of(config, REWARD_TERMS, name), value) for name, value in others.items()))


def keys_that_need(config: RunConfig, need: Need) -> tuple[str, ...]:
    """Keys that name a reward term or an estimator that declares a need; none where there are no rollouts."""
    uses = entries_in_use(config) if config.uses_rollouts else ()
    readers = (REWARD_TERMS, ADVANTAGE_ESTIMATORS)
    return tuple(use.key for use in uses if use.registry in readers and need in use.registry.entry(use.name).needs)
