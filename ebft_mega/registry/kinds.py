"""The seven kinds of entries, each with its contract and the folder of the package's own. No torch.

An entry is added by adding a file to the folder, or by a plugin; nothing else names it.
"""

from typing import Any

from ebft_mega.extension.advantage_estimator import AdvantageEstimator
from ebft_mega.extension.feature_map import FeatureMap
from ebft_mega.extension.learning_rate_schedule import LearningRateSchedule
from ebft_mega.extension.reward_term import RewardTerm
from ebft_mega.extension.store import Store
from ebft_mega.extension.text_format import TextFormat
from ebft_mega.extension.update_rule import Optimizer
from ebft_mega.registry.registry import Registry

REWARD_TERMS = Registry("reward term", RewardTerm, "ebft_mega.reward.terms")
ADVANTAGE_ESTIMATORS = Registry("advantage estimator", AdvantageEstimator, "ebft_mega.objective.estimators")
FEATURE_MAPS = Registry("feature map", FeatureMap, "ebft_mega.features.maps")
SCHEDULES = Registry("learning-rate schedule", LearningRateSchedule, "ebft_mega.train.schedules")
OPTIMIZERS = Registry("optimizer", Optimizer, "ebft_mega.parallel.optimizers")
TEXT_FORMATS = Registry("text format", TextFormat, "ebft_mega.data.text.formats")
STORES = Registry("store", Store, "ebft_mega.data.store.places")

ALL_REGISTRIES: tuple[Registry[Any], ...] = (
    *(FEATURE_MAPS, REWARD_TERMS, ADVANTAGE_ESTIMATORS, SCHEDULES, OPTIMIZERS, TEXT_FORMATS, STORES),
)
