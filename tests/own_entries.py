"""Entries that no folder of the package has: one for each need, and an estimator with an advantage for each token."""

from contextlib import contextmanager

import torch

from ebft_mega.extension.advantage_estimator import AdvantageEstimator
from ebft_mega.extension.options import Section, key
from ebft_mega.extension.reward_term import RewardTerm
from ebft_mega.registry.kinds import ADVANTAGE_ESTIMATORS, REWARD_TERMS


class MatchesOptions(Section):
    first: int = key(0, "Position from which tokens are compared.", ge=0)


class Matches(RewardTerm):
    """Share of a rollout's tokens that stand in the target at the same place."""

    name = "matches"
    needs = frozenset({"tokens"})
    Options = MatchesOptions

    def values(self, inputs):
        equal = inputs.rollout_tokens == inputs.target_tokens[:, None]
        return equal[..., self.options.first :].double().mean(dim=-1)


class Surprise(RewardTerm):
    """Mean of minus the log-probability of a rollout's tokens."""

    name = "surprise"
    needs = frozenset({"logprobs"})
    baseline = "none"

    def values(self, inputs):
        return -inputs.logprobs.double().mean(dim=-1)


class Letters(RewardTerm):
    """Number of characters of a rollout's text that the target's text has, too."""

    name = "letters"
    needs = frozenset({"texts"})

    def values(self, inputs):
        rows = zip(inputs.rollout_texts, inputs.target_texts, strict=True)
        counts = [
            [
                [sum(letter in target for letter in text) for text, target in zip(texts, targets, strict=True)]
                for texts in row
            ]
            for row, targets in rows
        ]
        return torch.tensor(counts, dtype=torch.float64, device=inputs.gram.device)


class Later(AdvantageEstimator):
    """The reward times the number of the token, counted from 1; twice that where the token is the target's."""

    name = "later"
    needs = frozenset({"tokens"})

    def advantages(self, inputs):
        length = inputs.plan.generate_length
        weights = torch.arange(1, length + 1, dtype=torch.float64, device=inputs.rewards.reward.device)
        is_target = inputs.rollout_tokens == inputs.target_tokens[:, None]
        return inputs.rewards.reward[..., None] * weights * (1 + is_target.double())


@contextmanager
def in_registries(*entries):
    """The entries under their names, as those of plugins."""
    before = {registry: dict(registry.added) for registry in (REWARD_TERMS, ADVANTAGE_ESTIMATORS)}
    for entry in entries or (Matches, Surprise, Letters, Later):
        registry = REWARD_TERMS if issubclass(entry, RewardTerm) else ADVANTAGE_ESTIMATORS
        registry.added[entry.name] = entry
    try:
        yield
    finally:
        for registry, added in before.items():
            registry.added.clear()
            registry.added.update(added)


def letters_of(tokens):
    """A text for token ids, one character each."""
    return "".join(chr(ord("a") + token % 20) for token in tokens)
