"""Decide which configuration changes between a checkpoint and the run that resumes from it are refused or noted."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from enum import Enum, auto
from typing import Any

from pydantic_core import PydanticUndefined, to_jsonable_python

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.checkpoint.run_state import STATE_NAME
from ebft_mega.checkpoint.saved_run import SavedRun
from ebft_mega.config.entries import advantage_estimator, entries_in_use, learning_rates
from ebft_mega.config.fields import path_kind
from ebft_mega.config.paths import written_path
from ebft_mega.config.rules import yaml_text
from ebft_mega.config.schema import EbftConfig, RunConfig, all_keys
from ebft_mega.config.section_values import OPTIONS
from ebft_mega.critic.critic_record import CriticRecord
from ebft_mega.errors import Problem
from ebft_mega.registry.kinds import FEATURE_MAPS, REWARD_TERMS


class Rule(Enum):
    """What follows from a changed value of a configuration key."""

    REFUSED = auto()  # the run would be another one
    NOTED = auto()  # it may change; a note says what follows
    LENGTH = auto()  # noted where learning rates depend on the number of steps; else the run is only longer or shorter
    BY_CONTENTS = auto()  # not the key is compared, but what it names
    BY_ENTRY = auto()  # each option of an entry is compared by itself, with the rule of the entry's kind
    FREE = auto()  # how and where the same run is done


# How the same objective is estimated, and the weights of its two terms.
_ESTIMATE = ("advantage_estimator", "alignment_coef", "diversity_coef")
REFUSED = (
    "seed",
    "data.document_masking",
    "data.train_on_first_token",
    "train.optimizer",
    *(f"ebft.{name}" for name in EbftConfig.model_fields if name not in ("feature_model", *_ESTIMATE)),
)
# Keys that may change, with what follows from it.
_OTHER_STEPS = "the steps from here on are not those of an uninterrupted run"
_OTHER_ROWS = "held-out figures from here on may be of other rows than those before"
NOTED = {
    **{f"ebft.{name}": _OTHER_STEPS for name in _ESTIMATE},
    "train.global_batch_size": "a step reads another number of rows from here on",
    "train.lr": _OTHER_STEPS,
    "train.lr_scheduler": _OTHER_STEPS,
    "train.min_lr": _OTHER_STEPS,
    "train.warmup_steps": _OTHER_STEPS,
    "train.warmup_share": _OTHER_STEPS,
    "train.weight_decay": _OTHER_STEPS,
    "train.betas": _OTHER_STEPS,
    "train.grad_clip": _OTHER_STEPS,
    "train.dtype": _OTHER_STEPS,
    "data.skip_rows": "only rows that are read from here on are left out by it",
    "evaluation.shards": _OTHER_ROWS,
    "evaluation.rows": _OTHER_ROWS,
    "evaluation.interval": "evaluations come at other steps",
}
LENGTH = ("train.max_steps", "train.max_tokens")
# The architecture is compared below, the weights of the feature network by their hash, the data by its state
# (`StreamState`).
BY_CONTENTS = (
    "model.init_from",
    "model.config",
    "ebft.feature_model",
    "data.shards",
    "data.sources",
    "data.sequence_length",
    "data.tokenizer",
)
BY_ENTRY = (OPTIONS,)
# Kinds whose options, as the keys that name their entries, make another run.
_REFUSED_KINDS = (FEATURE_MAPS, REWARD_TERMS)
FREE = (
    "output_dir",
    "plugins",  # their code is compared, and noted
    "permissions",
    "deterministic",
    "data.on_error",
    "data.allow_changed",
    "data.max_skipped_rows",
    "data.max_skipped_share",
    "data.workers",
    "data.cache",
    "data.cache_gigabytes",
    "data.redirect_hosts",
    "train.micro_batch_size",
    "train.max_run_minutes",
    "train.step_timeout_minutes",
    "train.activation_checkpointing",
    "train.attention",
)
FREE_SECTIONS = ("parallel", "zero", "learn", "checkpoint", "profile")
_KEYS = {
    Rule.REFUSED: REFUSED,
    Rule.NOTED: tuple(NOTED),
    Rule.LENGTH: LENGTH,
    Rule.BY_CONTENTS: BY_CONTENTS,
    Rule.BY_ENTRY: BY_ENTRY,
    Rule.FREE: FREE,
}


def rule_of(key: str) -> Rule:
    """The rule for a configuration key. Every key of the schema has exactly one."""
    rules = [rule for rule, keys in _KEYS.items() if key in keys]
    rules += [Rule.FREE] * (key.split(".")[0] in FREE_SECTIONS)
    assert len(rules) == 1, f"{key}: list it under exactly one rule"
    return rules[0]


def refused_changes(
    saved: SavedRun, config: RunConfig, architecture: Architecture, critic: CriticRecord | None = None
) -> list[Problem]:
    """List the changes that prevent resuming from a checkpoint, each with its old and new value.

    Data and feature network are not compared here: the data by their state (`rows.stream_state.check_resumable`), the
    feature network by the hash of its weights (`lifecycle.model_identity`).

    Args:
        config: of the run that is about to resume.
        architecture: of its model.
        critic: its token critic; None: it has none.
    """
    advice = f"in {saved.directory}; {_advice(saved)}"
    problems = []
    for key, rule, old, new in changed_values(values_by_key(saved.config), config):
        if rule is Rule.REFUSED:
            problems.append(Problem(config.place(key), key, shown(new), f"{shown(old)}, as {advice}"))
    model_key = _model_key(config)
    then, now = sizes(saved.architecture), sizes(architecture)
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            old, new = shown(then.get(name)), shown(now.get(name))
            problems.append(Problem(config.place(model_key), f"{model_key}: {name}", new, f"{old}, as {advice}"))
    named = {problem.key for problem in problems}
    return problems + [problem for problem in other_critic(saved, config, critic) if problem.key not in named]


def other_critic(saved: SavedRun, config: RunConfig, critic: CriticRecord | None) -> list[Problem]:
    """List why a run cannot take over what the token critic of a checkpoint has learned.

    Args:
        critic: the run's; None: it has none, and takes nothing over.
    """
    then = saved.state.critic
    if critic is None or then is None:
        return []
    estimator = config.ebft.advantage_estimator
    has_rank = "rank" in advantage_estimator(config).Options.model_fields
    keys = {
        **{"feature_map": "ebft.embed_method", "feature_norm": "ebft.feature_norm", "layers": "ebft.feature_layers"},
        **{"layer_weights": "ebft.layer_weights", "generate_length": "ebft.generate_max_len"},
        "rank": f"{OPTIONS}.{estimator}.rank" if has_rank else "ebft.advantage_estimator",
        "vocabulary": f"{_model_key(config)}: vocab_size",
    }
    words = {"layers": "features of the layers ", "rank": "" if has_rank else "rank "}
    problems = []
    for field, key in keys.items():
        found, old = (words.get(field, "") + shown(_listed(getattr(each, field))) for each in (critic, then))
        if found != old:
            expected = f"{old}, as the token critic in {saved.directory / STATE_NAME} has it; {_advice(saved)}"
            problems.append(Problem(config.place(key.split(":")[0]), key, found, expected))
    return problems


def _critic_notes(saved: SavedRun, config: RunConfig, critic: CriticRecord | None) -> list[str]:
    """Say where a token critic begins anew, or is left out."""
    then, estimator = saved.state.critic, config.ebft.advantage_estimator
    if critic is not None and then is None:
        return [f"{saved.directory} has no token critic: that of {estimator} begins with nothing learned"]
    if critic is None and then is not None:
        learned = f"the token critic in {saved.directory}, which has learned from {then.batches} batches"
        return [f"{learned}, is left out: ebft.advantage_estimator is {estimator}"]
    return []


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _model_key(config: RunConfig) -> str:
    return "model.init_from" if config.model.config is None else "model.config"


def _advice(saved: SavedRun) -> str:
    return f"a new run from its weights is `model.init_from: {saved.directory}`"


def noted_changes(saved: SavedRun, config: RunConfig, critic: CriticRecord | None = None) -> list[str]:
    """List the allowed changes after which the run differs from one that never stopped.

    Args:
        critic: the token critic of the run that is about to resume; None: it has none.
    """
    notes = [
        f"{key} was {shown(old)} and is {shown(new)} now: {NOTED.get(key, _OTHER_STEPS)}"
        for key, rule, old, new in changed_values(values_by_key(saved.config), config)
        if rule is Rule.NOTED
    ]
    old_steps = total_steps(saved.config)
    if old_steps is not None and rates_depend_on_length(config, old_steps):
        names = " or ".join(LENGTH)
        notes.append(f"the run had {old_steps} steps and has {config.total_steps} now ({names}): {_OTHER_STEPS}")
    return notes + _critic_notes(saved, config, critic)


def rates_depend_on_length(config: RunConfig, old_steps: int) -> bool:
    """Whether a run with another number of steps has other learning rates in the steps that it has, too."""
    now, then = learning_rates(config), learning_rates(config, old_steps)
    return any(then.at(step) != now.at(step) for step in now.some_steps() if step < old_steps)


def changed_values(then: Mapping[str, Any], config: RunConfig) -> Iterator[tuple[str, Rule, Any, Any]]:
    """List every key that differs, with its rule, old and new value; the old value of a new key is its default.

    Args:
        then: values by dotted key, see `values_by_key`.
    """
    now = values_by_key(config.model_dump(mode="json"))
    for key, field in all_keys().items():
        default = field.get_default(call_default_factory=True)
        default = None if default is PydanticUndefined else to_jsonable_python(default)
        old, new = then.get(key, default), now[key]
        if key in BY_ENTRY:
            yield from _changed_options(old, config)
            continue
        # An earlier version of this program wrote paths as they had been given.
        if old != new and not (isinstance(old, str) and path_kind(field) and written_path(old) == new):
            yield key, rule_of(key), old, new


def _changed_options(then: Any, config: RunConfig) -> Iterator[tuple[str, Rule, Any, Any]]:
    """List the options of entries in use that differ; what an entry did not have before was its default."""
    for use in entries_in_use(config):
        before = then.get(use.name) if isinstance(then, dict) else None
        fields = use.registry.entry(use.name).Options.model_fields
        for name, new in config.options.get(use.name, {}).items() if use.has_options else ():
            default = fields[name].get_default(call_default_factory=True)
            default = None if default is PydanticUndefined else to_jsonable_python(default)
            old = before.get(name, default) if isinstance(before, dict) else default
            if old != new:
                rule = Rule.REFUSED if use.registry in _REFUSED_KINDS else Rule.NOTED
                yield f"{OPTIONS}.{use.name}.{name}", rule, old, new


def values_by_key(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Take the values of all known keys that a configuration has, by dotted key.

    Args:
        tree: sections of keys, as `config.resolved.yaml` has them.
    """
    values = {}
    for key in all_keys():
        section, _, leaf = key.rpartition(".")
        branch = tree.get(section, {}) if section else tree
        if leaf in branch:
            values[key] = branch[leaf]
    return values


def total_steps(tree: dict[str, Any]) -> int | None:
    """Count the optimizer steps of the whole run by a saved configuration; None where it does not say."""
    train, data = tree.get("train", {}), tree.get("data", {})
    if train.get("max_steps") is not None:
        return int(train["max_steps"])
    try:
        return int(train["max_tokens"]) // (int(train["global_batch_size"]) * int(data["sequence_length"]))
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def sizes(architecture: Architecture) -> dict[str, Any]:
    """List what must be equal for weights to fit a model: all fields, and rotary settings whatever their spelling."""
    fields = {item.name: getattr(architecture, item.name) for item in dataclasses.fields(architecture) if item.compare}
    rotary = dataclasses.asdict(fields.pop("rotary"))
    del fields["hf_config"]
    return {**fields, **{name if name.startswith("rope_") else f"rope_{name}": value for name, value in rotary.items()}}


def shown(value: Any) -> str:
    """Write a value as it stands in a configuration."""
    return yaml_text(value) if not isinstance(value, list | dict) else json.dumps(value)
