"""Tokens, log-probabilities and texts of rollouts and targets, for the entries that declare a need of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ebft_mega.block_plan import BlockPlan
from ebft_mega.extension.advantage_estimator import AdvantageEstimator
from ebft_mega.extension.entry_fault import EntryFaultError
from ebft_mega.extension.reward_term import RewardTerm
from ebft_mega.extension.sampled_inputs import Need
from ebft_mega.types import CriticValues

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class SampledBlocks:
    """What was sampled for the rows of a micro-batch, and what stands there."""

    plan: BlockPlan
    rollout_tokens: Tensor  # int64 [B, n, K, G]
    row_tokens: Tensor  # int64 [B, P]
    logprobs: Tensor | None = None  # float32 [B, n, K, G]; None: nothing declares them
    decode: Decode | None = None  # token ids to text; None: nothing declares texts
    critic: CriticValues | None = None  # None: nothing declares the critic, or it is not fitted yet

    @cached_property
    def target_tokens(self) -> Tensor:
        """The true continuations, int64 [B, K, G]."""
        plan = self.plan
        return self.row_tokens[:, plan.context_length :].unfold(1, plan.generate_length, plan.stride)

    @cached_property
    def rollout_texts(self) -> list[list[list[str]]]:
        """By row, sample and block; waits for the device."""
        return [[self._texts(sample) for sample in row] for row in self.rollout_tokens.tolist()]

    @cached_property
    def target_texts(self) -> list[list[str]]:
        """By row and block; waits for the device."""
        return [self._texts(row) for row in self.target_tokens.tolist()]

    def _texts(self, windows: Sequence[Sequence[int]]) -> list[str]:
        assert self.decode is not None, "a run in which an entry declares texts has a tokenizer"
        return [self.decode(window) for window in windows]


class DeclaredInputs:
    """What one entry is given: reading what it does not declare is a fault of it."""

    def __init__(self, entry: RewardTerm | AdvantageEstimator, plan: BlockPlan, sampled: SampledBlocks | None):
        """Args: sampled: None: there are inner products alone."""
        self.plan = plan
        self._entry, self._sampled = entry, sampled

    @property
    def rollout_tokens(self) -> Tensor:
        """int64 [B, n, K, G]; needs `tokens`."""
        return self._declared("rollout_tokens", "tokens").rollout_tokens

    @property
    def target_tokens(self) -> Tensor:
        """int64 [B, K, G]; needs `tokens`."""
        return self._declared("target_tokens", "tokens").target_tokens

    @property
    def logprobs(self) -> Tensor:
        """float32 [B, n, K, G]; needs `logprobs`."""
        logprobs = self._declared("logprobs", "logprobs").logprobs
        assert logprobs is not None, "the sampling notes the log-probabilities that an entry declares"
        return logprobs

    @property
    def rollout_texts(self) -> list[list[list[str]]]:
        """By row, sample and block; needs `texts`."""
        return self._declared("rollout_texts", "texts").rollout_texts

    @property
    def target_texts(self) -> list[list[str]]:
        """By row and block; needs `texts`."""
        return self._declared("target_texts", "texts").target_texts

    @property
    def critic(self) -> CriticValues | None:
        """Of alignment and diversity; needs `critic`. None: it is not fitted yet."""
        return self._declared("critic", "critic").critic

    def tensors(self) -> list[Tensor]:
        """Everything that an entry may read, declared or not."""
        if self._sampled is None:
            return []
        critic = self._sampled.critic
        given = [self._sampled.rollout_tokens, self._sampled.row_tokens, self._sampled.logprobs]
        given += [] if critic is None else [critic.advantages, critic.directions, critic.expected]
        return [tensor for tensor in given if tensor is not None]

    def _declared(self, name: str, need: Need) -> SampledBlocks:
        if need not in self._entry.needs:
            declared = ", ".join(sorted(self._entry.needs)) or "nothing"
            found = f"that it reads inputs.{name}, and needs declares {declared}"
            raise EntryFaultError(self._entry, found, f"{need!r} in needs, or no reading of it")
        assert self._sampled is not None, "entries that declare a need are used on sampled rollouts alone"
        return self._sampled
