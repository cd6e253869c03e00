"""Rewards and advantages of rollouts, by the entries that a configuration names."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from ebft_mega.block_plan import BlockPlan
from ebft_mega.config.entries import advantage_estimator, reward_terms
from ebft_mega.config.schema import RunConfig
from ebft_mega.errors import EntryError, Problem
from ebft_mega.extension.advantage_estimator import AdvantageEstimator
from ebft_mega.extension.entry_fault import EntryFaultError
from ebft_mega.extension.reward_term import RewardTerm
from ebft_mega.extension.sampled_inputs import Need
from ebft_mega.objective.block_advantages import block_advantages
from ebft_mega.reward.block_inputs import BlockInputs
from ebft_mega.reward.block_rewards import block_rewards
from ebft_mega.reward.sampled_blocks import Decode, SampledBlocks
from ebft_mega.reward.whitening import Whitening
from ebft_mega.rollout.generate import Sampled
from ebft_mega.runtime.agreement import first_problem
from ebft_mega.types import CriticValues, Experience, Rollout, TokenBatch

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rewarding:
    """How rollouts are rewarded, and what becomes of their rewards."""

    plan: BlockPlan
    whitening: Whitening
    terms: tuple[tuple[RewardTerm, float], ...]  # with their coefficients, in the order of their sum
    estimator: AdvantageEstimator
    place: Callable[[str], str] = lambda key: key  # where a key of the configuration stands
    decode: Decode | None = None  # token ids to text; None: no entry declares texts

    @classmethod
    def of(cls, config: RunConfig, decode: Decode | None = None) -> "Rewarding":
        """Take the entries that a configuration names, with their options."""
        terms, estimator = reward_terms(config), advantage_estimator(config)
        return cls(config.block_plan, config.ebft.reward_whitening, terms, estimator, config.place, decode)

    @property
    def entries(self) -> tuple[RewardTerm | AdvantageEstimator, ...]:
        """All that take part."""
        return (*(term for term, _ in self.terms), self.estimator)

    @cached_property
    def needs(self) -> frozenset[Need]:
        """What any of them declares to read."""
        return frozenset(need for entry in self.entries for need in entry.needs)

    @cached_property
    def all_are_built_in(self) -> bool:
        """Whether all of them are the package's own."""
        return all(entry.is_built_in() for entry in self.entries)

    def problem_of(self, fault: EntryFaultError) -> Problem:
        """A fault with the places of the key that names the entry, and of the entry itself."""
        key = f"ebft.reward_terms.{fault.entry.name}"
        if fault.entry is self.estimator:
            key = "ebft.advantage_estimator"
        return Problem(fault.place, key, fault.found, fault.expected).within(self.place(key))


def make_experiences(
    rewarding: Rewarding,
    micro_batches: Sequence[TokenBatch],
    sampled: Sequence[Sampled],
    grams: Sequence[Tensor],
    counted_blocks: Sequence[Tensor] | None,
    device: torch.device,
    critic: Sequence[CriticValues | None] | None = None,
) -> list[Experience]:
    """Rewards and advantages of a step's rollouts, by micro-batch; see `make_experience`.

    Args:
        counted_blocks: bool [B, K] each, blocks that count; None: all.
        device: of this rank's collectives.
        critic: what the token critic makes of each; None: the estimator reads none.
    Raises:
        EntryError: on every rank, where an entry did not hold its contract on one of them.
    Communication: what `without_faults` says.
    """
    counted: Sequence[Tensor | None] = [None] * len(grams) if counted_blocks is None else counted_blocks
    values: Sequence[CriticValues | None] = [None] * len(grams) if critic is None else critic
    return without_faults(
        rewarding,
        device,
        lambda: [
            make_experience(gram, item.rollout, rewarding, blocks, rows.tokens, item.logprobs, value)
            for gram, item, blocks, rows, value in zip(grams, sampled, counted, micro_batches, values, strict=True)
        ],
    )


def make_experience(
    gram: Tensor,
    rollout: Rollout,
    rewarding: Rewarding,
    counted_blocks: Tensor | None,
    tokens: Tensor,
    logprobs: Tensor | None = None,
    critic: CriticValues | None = None,
) -> Experience:
    """Rewards and advantages of a micro-batch's rollouts.

    Args:
        gram: inner products of features, float64 [B, K, n + 1, n + 1].
        counted_blocks: bool [B, K], blocks that count; None: all.
        tokens: of the rows, int64 [B, P].
        logprobs: of the rollouts, float32 [B, n, K, G]; None: no entry declares them.
        critic: of the rollouts; None: the estimator does not declare it, or it is not fitted yet.
    Raises:
        EntryFaultError: an entry does not hold its contract.
    Communication: none; every rank of a replica has the same of all of these.
    """
    sampled = SampledBlocks(rewarding.plan, rollout.tokens, tokens, logprobs, rewarding.decode, critic)
    inputs = BlockInputs.of(gram, rewarding.whitening, rewarding.plan, sampled)
    rewards = block_rewards(inputs, rewarding.terms)
    advantages = block_advantages(rewarding.estimator, rewards, rewarding.plan, sampled)
    if counted_blocks is not None:
        counted = counted_blocks[:, None]
        advantages = advantages.masked_fill(~(counted if advantages.dim() == 3 else counted[..., None]), 0.0)
    return Experience(rollout, gram, rewards, advantages, counted_blocks, critic)


def without_faults(rewarding: Rewarding, device: torch.device, compute: Callable[[], T]) -> T:
    """Call what calls the entries; a fault of one of them ends the run on all ranks alike.

    Args:
        device: of this rank's collectives.
    Raises:
        EntryError: on every rank the first fault by rank, with its places.
    Communication: none if all entries are the package's own; otherwise one all-reduce of 4 bytes over the world, for
        which the host waits, and after a fault a gathering of its words.
    """
    result: list[T] = []
    problem: Problem | None = None
    try:
        result.append(compute())
    except EntryFaultError as fault:
        logger.info("an entry does not hold its contract", exc_info=fault)  # with the entry's own traceback
        problem = rewarding.problem_of(fault)
    if not rewarding.all_are_built_in:
        problem = first_problem(problem, device)
    if problem is not None:
        raise EntryError(problem)
    return result[0]
