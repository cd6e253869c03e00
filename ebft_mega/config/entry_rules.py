"""Checks of the entries that a configuration names, as far as they can be made before anything starts.

They are rules of `rules.py`, where it says what a rule is.
"""

import re
from collections.abc import Iterator
from dataclasses import replace

from ebft_mega.config.entries import feature_map, learning_rates, tapped_fractions
from ebft_mega.config.fields import yaml_text
from ebft_mega.config.schema import RunConfig
from ebft_mega.errors import EntryError, Problem
from ebft_mega.extension.entry import place_of_entry
from ebft_mega.extension.entry_fault import EntryFaultError
from ebft_mega.extension.feature_map import check_reading
from ebft_mega.extension.reward_term import RESERVED_NAMES
from ebft_mega.extension.update_rule import MOMENT_NAME, RESERVED_MOMENTS
from ebft_mega.registry.kinds import OPTIMIZERS, REWARD_TERMS

# Keys that the checks of the feature map and of the schedule read.
FEATURES = (
    "options",
    *(f"ebft.{name}" for name in ("embed_method", "feature_layers", "generate_max_len", "layer_weights")),
)
RATES = (
    "train.lr_scheduler",
    "options",
    *(f"train.{name}" for name in ("lr", "min_lr", "warmup_steps", "warmup_share")),
)


def terms_have_names_of_their_own(config: RunConfig) -> Iterator[Problem]:
    """Terms with keys of their own, and names that metrics or traces have."""
    ebft = config.ebft
    for name in ("alignment", "diversity"):
        if name in ebft.reward_terms:
            found = f"{yaml_text(ebft.reward_terms[name])}, beside ebft.{name}_coef {getattr(ebft, f'{name}_coef')}"
            yield Problem("", f"ebft.reward_terms.{name}", found, f"ebft.{name}_coef alone, which weighs that term")
    for name in ebft.reward_terms:
        if name in RESERVED_NAMES:
            found = f"a term that is called {name} ({place_of_entry(REWARD_TERMS.entry(name))})"
            yield Problem(
                "", f"ebft.reward_terms.{name}", found, "another name: a metric or a traced tensor has this one"
            )


def schedule_keeps_its_contract(config: RunConfig) -> Iterator[Problem]:
    """A factor of the schedule that is not a number from 0 to 1, at some steps of the run."""
    rates = learning_rates(config)
    key, step = "train.lr_scheduler", 0
    try:
        for step in rates.some_steps():
            rates.at(step)
    except EntryError as error:
        problem: Problem = error.args[0]
        yield replace(problem, where="", found=f"{problem.found} ({problem.where})")
    except Exception as error:  # whatever the code of a plugin raises
        place = place_of_entry(type(rates.schedule))
        found = f"{rates.schedule.name}, which raises {type(error).__name__} at step {step}: {error} ({place})"
        yield Problem("", key, found, "a number from 0 to 1 for every step")


def feature_map_keeps_its_contract(config: RunConfig) -> Iterator[Problem]:
    """What the map says that it reads, and the weights of its layers."""
    ebft, method = config.ebft, feature_map(config)
    try:
        check_reading(method, tuple(sorted(ebft.feature_layers)), ebft.generate_max_len)
    except EntryFaultError as fault:
        found = f"{method.name}, which says {fault.found} ({place_of_entry(type(method))})"
        yield Problem("", "ebft.embed_method", found, fault.expected)
        return
    weights, layers, key = ebft.layer_weights, tapped_fractions(config), "ebft.layer_weights"
    if weights is None:
        return
    if len(weights) != len(layers):
        one_each = f"one for each layer that {method.name} reads: {yaml_text(list(layers))}"
        yield Problem("", key, f"{len(weights)} weights", f"{len(layers)} weights, {one_each}")
    elif not any(weights):
        yield Problem("", key, yaml_text(list(weights)), "at least one weight above 0")
    if list(ebft.feature_layers) != sorted(ebft.feature_layers):
        expected = "ascending depths, with ebft.layer_weights, which go from the shallowest to the deepest"
        yield Problem("", "ebft.feature_layers", yaml_text(list(ebft.feature_layers)), expected)


def optimizer_keeps_its_contract(config: RunConfig) -> Iterator[Problem]:
    """Names of moments, and the number of temporaries."""
    rule = OPTIMIZERS.entry(config.train.optimizer)
    place, moments = place_of_entry(rule), rule.moments
    names_are_names = isinstance(moments, tuple) and all(
        isinstance(name, str) and re.fullmatch(MOMENT_NAME, name) and name not in RESERVED_MOMENTS for name in moments
    )
    if not names_are_names or len(set(moments)) < len(moments):
        expected = "a tuple of different names of lower-case letters, digits and _, none of them "
        found = f"{rule.name}, whose moments are {moments!r} ({place})"
        yield Problem("", "train.optimizer", found, expected + " or ".join(RESERVED_MOMENTS))
    if isinstance(rule.temporaries, bool) or not isinstance(rule.temporaries, int) or rule.temporaries < 0:
        found = f"{rule.name}, whose temporaries are {rule.temporaries!r} ({place})"
        yield Problem("", "train.optimizer", found, "an integer >= 0")
