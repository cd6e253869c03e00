"""The entries that a configuration names, each with its options."""

from typing import TypeVar

from ebft_mega.config.schema import RunConfig
from ebft_mega.extension.advantage_estimator import AdvantageEstimator
from ebft_mega.extension.entry import Entry
from ebft_mega.extension.feature_map import FeatureMap
from ebft_mega.extension.learning_rate_schedule import LearningRates
from ebft_mega.extension.reward_term import RewardTerm
from ebft_mega.registry.kinds import ADVANTAGE_ESTIMATORS, FEATURE_MAPS, REWARD_TERMS, SCHEDULES
from ebft_mega.registry.registry import Registry

E = TypeVar("E", bound=Entry)


def entry_of(config: RunConfig, registry: Registry[E], name: str) -> E:
    """The entry of a name with its options of a configuration, which `load_config` has checked."""
    kind = registry.entry(name)
    return kind(kind.Options.model_validate(config.options.get(name, {})))


def advantage_estimator(config: RunConfig) -> AdvantageEstimator:
    """The entry of `ebft.advantage_estimator`."""
    return entry_of(config, ADVANTAGE_ESTIMATORS, config.ebft.advantage_estimator)


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


def reward_terms(config: RunConfig) -> tuple[tuple[RewardTerm, float], ...]:
    """The terms of the reward with their coefficients: alignment, diversity (a penalty), then `ebft.reward_terms`."""
    ebft = config.ebft
    coefficients = {"alignment": ebft.alignment_coef, "diversity": -ebft.diversity_coef} | ebft.reward_terms
    return tuple((entry_of(config, REWARD_TERMS, name), value) for name, value in coefficients.items())
