"""A policy and a causal feature map so small that a step's mean over all sample sets can be written out.

The policy is a table of logits: those of token t by the tokens before it. So are the hidden states of the feature
network: those of token t by the tokens up to t, and others for the target. One block has n rollouts of G tokens; a
*sample set* is n of the S = V^G continuations, and a mean over all S^n sets, each with its probability, is an exact
expectation. Rewards, advantages, loss and log-probabilities with their gradient are the package's; the gradients of
objectives that means are compared with are of explicit features and autograd alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ebft_mega.block_plan import BlockPlan
from ebft_mega.critic.critic_terms import Objective
from ebft_mega.critic.fitted_critic import FittedCritic, row_directions
from ebft_mega.critic.ridge import CriticWeights
from ebft_mega.extension.advantage_estimator import AdvantageEstimator
from ebft_mega.extension.critic_settings import CriticSettings
from ebft_mega.extension.reward_term import RewardTerm
from ebft_mega.features.gram import FeatureRecipe, block_grams
from ebft_mega.features.own_features import OwnFeatures
from ebft_mega.forest import Forest
from ebft_mega.model.head import LinearValues, ScoredTokens, logprobs_of_rows, score_rows
from ebft_mega.objective.block_advantages import block_advantages
from ebft_mega.objective.losses import count_tokens, loss_terms
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.parallel.vocabulary import VocabularySlice
from ebft_mega.registry.kinds import FEATURE_MAPS
from ebft_mega.reward.block_inputs import BlockInputs
from ebft_mega.reward.block_rewards import block_rewards
from ebft_mega.reward.sampled_blocks import SampledBlocks
from ebft_mega.reward.whitening import Whitening
from ebft_mega.rollout.generate import Sampled
from ebft_mega.types import BlockRewards, CriticValues, PolicyLogprobs, Rollout, TokenBatch
from tests.explicit_features import explicit_feature

LAYERS, HIDDEN = 2, 3
Terms = list[tuple[RewardTerm, float]]


@dataclass(frozen=True)
class Toy:
    """One block: its policy, its features and its target."""

    tables: tuple[Tensor, ...]  # of every token t its logits [V^t, V], float64
    hidden: Tensor  # [S, G, L, H], float64
    target: Tensor  # [G, L, H]
    num_samples: int  # n
    temperature: float
    groups: ProcessGroups  # of one rank

    @classmethod
    def of(
        cls, groups: ProcessGroups, vocabulary: int, length: int, samples: int, temperature: float = 0.6, seed: int = 0
    ) -> "Toy":
        """Make a random one: far from uniform, hidden states of very different lengths."""
        draws = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64, generator=draws)

        tables = tuple(0.8 * normal(vocabulary**t, vocabulary) for t in range(length))
        scale = torch.tensor([0.3, 5.0], dtype=torch.float64)[:, None]  # of the layers
        tokens = [scale * normal(vocabulary ** (t + 1), LAYERS, HIDDEN) for t in range(length)]
        tokens = [states * (0.5 + normal(len(states), 1, 1).square()) for states in tokens]
        hidden = torch.stack(
            [each.repeat_interleave(vocabulary ** (length - 1 - t), dim=0) for t, each in enumerate(tokens)], dim=1
        )
        return cls(tables, hidden, scale * normal(length, LAYERS, HIDDEN), samples, temperature, groups)

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.tables[0].shape[1]

    @property
    def length(self) -> int:
        """G."""
        return len(self.tables)

    @property
    def num_continuations(self) -> int:
        """S."""
        return len(self.hidden)

    @property
    def plan(self) -> BlockPlan:
        """Rows of one block."""
        return BlockPlan(1 + self.length, 1, 1, self.length, self.num_samples)

    @property
    def text(self) -> Tensor:
        """Tokens of every row: one before the anchor, then those of the target, int64 [1 + G]."""
        return torch.arange(self.plan.sequence_length) % self.vocabulary

    @cached_property
    def tokens(self) -> Tensor:
        """Of every continuation, int64 [S, G]; the first token is that of the highest digit."""
        return torch.stack([self.prefixes(t + 1) for t in range(self.length)], dim=1) % self.vocabulary

    def prefixes(self, length: int) -> Tensor:
        """Of every continuation the number of its first tokens among the V^length prefixes: its row of a table, [S]."""
        return torch.arange(self.num_continuations) // self.vocabulary ** (self.length - length)

    @cached_property
    def sample_sets(self) -> Tensor:
        """All of them: numbers of continuations, int64 [S^n, n]."""
        numbers = [torch.arange(self.num_continuations)] * self.num_samples
        return torch.cartesian_prod(*numbers).view(-1, self.num_samples)

    @cached_property
    def own_slice(self) -> VocabularySlice:
        """The whole vocabulary."""
        return VocabularySlice.of(self.vocabulary, self.groups)

    def of_continuations(self, by_prefix: list[Tensor]) -> Tensor:
        """Numbers of each token after each prefix, [V^t, V] for every t, of all continuations: [S, G]."""
        return torch.stack([values.flatten()[self.prefixes(t + 1)] for t, values in enumerate(by_prefix)], dim=1)

    @cached_property
    def probabilities(self) -> Tensor:
        """Of every continuation at the temperature, [S], without the package."""
        return self.probabilities_by(self.tables)

    def probabilities_by(self, tables: tuple[Tensor, ...]) -> Tensor:
        """The same for other logits, with gradient."""
        logprobs = [(table / self.temperature).log_softmax(dim=-1) for table in tables]
        return self.of_continuations(logprobs).sum(dim=1).exp()

    def logprobs_by(
        self, tables: tuple[Tensor, ...], values: list[LinearValues] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What the package's head makes of logits, with its gradient; its matrix is the identity.

        Args:
            values: of each table's rows, whose expectations are wanted.
        Returns:
            Log-probability of each token of every continuation, [S, G], and the sum of all expectations.
        """
        identity, every = torch.eye(self.vocabulary, dtype=torch.float64), torch.arange(self.vocabulary)
        scored, expectations = [], []
        for t, table in enumerate(tables):
            request = ScoredTokens(
                every.expand(len(table), -1), self._temperatures(table), values=None if values is None else values[t]
            )
            found = logprobs_of_rows(table, identity, request, self.own_slice)
            scored.append(found[:, : self.vocabulary])
            expectations.append(found[:, self.vocabulary :].sum())
        return self.of_continuations(scored), None if values is None else torch.stack(expectations).sum()

    def means(self, vectors: Tensor) -> list[Tensor]:
        """Of each table's rows the mean of the tokens' vectors [V, r], by the package: [V^t, r] each."""
        nothing = [torch.zeros(len(table), 1, dtype=torch.int64) for table in self.tables]
        return [
            score_rows(table, none, self._temperatures(table), self.own_slice, vectors).means
            for table, none in zip(self.tables, nothing, strict=True)
        ]

    def _temperatures(self, table: Tensor) -> Tensor:
        return torch.full((len(table),), self.temperature, dtype=torch.float64)

    @cached_property
    def scores(self) -> Tensor:
        """Gradient of each token's log-probability with respect to all logits, in closed form: [S, G, logits]."""
        found = []
        for t, table in enumerate(self.tables):
            prefix = self.prefixes(t)
            towards = torch.zeros(self.num_continuations, *table.shape, dtype=torch.float64)
            chosen = torch.nn.functional.one_hot(self.tokens[:, t], self.vocabulary)
            softmax = (table / self.temperature).softmax(dim=-1)
            towards[torch.arange(len(prefix)), prefix] = (chosen - softmax[prefix]) / self.temperature
            found.append(towards.flatten(1))
        sizes = [part.shape[1] for part in found]
        padded = [torch.nn.functional.pad(part, (sum(sizes[:t]), sum(sizes[t + 1 :]))) for t, part in enumerate(found)]
        return torch.stack(padded, dim=1)


@dataclass(frozen=True)
class Features:
    """How the hidden states of a toy become features."""

    method: str = "mean_pooling"
    norm: str = "joint"
    weights: tuple[float, ...] | None = None

    def gram(self, toy: Toy, own: list[OwnFeatures] | None = None) -> Tensor:
        """Inner products of all continuations' features and, last, the target's by the package, [S + 1, S + 1].

        Args:
            own: takes the features themselves, as of one block with S rollouts.
        """
        recipe = FeatureRecipe(FEATURE_MAPS.entry(self.method)(), toy.length, self.norm, self.weights)
        hidden = torch.cat((toy.hidden, toy.target[None]))[None, None, :, recipe.window.start :]
        taps = hidden.unbind(dim=4)
        shape = tuple(taps[0].shape[:-1])
        return block_grams(taps, shape, recipe, toy.groups, hidden.device, self.weights, own=own)[0, 0]

    def explicit(self, toy: Toy) -> tuple[Tensor, Tensor]:
        """The features themselves, [S, D] and [D], without the package."""
        return tuple(explicit_feature(each, self.method, self.norm, self.weights) for each in (toy.hidden, toy.target))


def rewards_of(
    toy: Toy, gram: Tensor, terms: Terms, whitening: Whitening = "none", sets: Tensor | None = None
) -> BlockRewards:
    """Rewards of sample sets, each as a row of one block: [sets, n, 1].

    Args:
        gram: of all continuations and the target (`Features.gram`).
        sets: int64 [sets, n]; None: all.
    """
    sets = toy.sample_sets if sets is None else sets
    members = _with_target(toy, sets)
    of_sets = gram[members[:, :, None], members[:, None, :]]
    inputs = BlockInputs.of(of_sets[:, None], whitening, toy.plan, _sampled(toy, sets))
    return block_rewards(inputs, terms)


@dataclass(frozen=True)
class Critic:
    """A token critic that knows nothing of the toy: numbers that mean nothing must not change a mean."""

    objective: Objective
    rank: int = 3
    merges: bool = True
    seed: int = 5

    def values(self, toy: Toy, features: Features) -> tuple[CriticValues, Forest, Tensor]:
        """What the package's critic makes of all sample sets, their forest, and its vectors of tokens [V, r]."""
        found: list[OwnFeatures] = []
        features.gram(toy, found)
        members = _with_target(toy, toy.sample_sets)
        own = replace(
            found[0],
            vectors=found[0].vectors[0, 0][members][:, None],
            tokens=None if found[0].tokens is None else found[0].tokens[0, 0][members][:, None],
        )
        draws = torch.Generator().manual_seed(self.seed)
        vectors = torch.randn(toy.vocabulary, self.rank, generator=draws)
        shape = toy.length, 4 * self.rank + 1, own.vectors.shape[-1]
        regressions = 0.3 * torch.randn(shape, generator=draws, dtype=torch.float64)
        weights = CriticWeights(regressions[:, : -self.rank], regressions[:, -self.rank :])
        critic = FittedCritic(vectors, shape[-1], CriticSettings(self.rank), self.objective, toy.plan, toy.groups)
        critic.state = replace(critic.state, weights=weights)
        sampled = _sampled(toy, toy.sample_sets)
        forest = Forest.of(sampled.rollout_tokens, self.merges)
        prefixes = _prefixes_of_rows(toy, forest)
        means = tuple(mean[rows] for mean, rows in zip(toy.means(vectors), prefixes, strict=True))
        rows = torch.arange(len(toy.sample_sets))
        batch = TokenBatch(sampled.row_tokens, torch.zeros_like(sampled.row_tokens), rows)
        step = critic.of_step([batch], [Sampled(Rollout(forest.rollouts(), forest), None, means=means)], None)
        step.take(0, own)
        return step.values[0], forest, vectors


def advantages_of(
    toy: Toy,
    rewards: BlockRewards,
    estimator: AdvantageEstimator,
    sets: Tensor | None = None,
    critic: CriticValues | None = None,
) -> Tensor:
    """Advantages of the same sets, [sets, n, 1] or [sets, n, 1, G]."""
    sampled = _sampled(toy, toy.sample_sets if sets is None else sets)
    return block_advantages(estimator, rewards, toy.plan, replace(sampled, critic=critic))


def mean_gradient(
    toy: Toy,
    advantages: Tensor,
    set_probabilities: Tensor | None = None,
    critic: tuple[CriticValues, Forest, Tensor] | None = None,
) -> Tensor:
    """The exact mean over all sample sets of the gradient of a step's loss with respect to all logits, [logits].

    Args:
        advantages: of all sample sets.
        set_probabilities: [sets]; None: rollouts are independent draws of the policy.
        critic: `Critic.values`; None: the loss has no expectations.
    """
    if set_probabilities is None:
        set_probabilities = toy.probabilities[toy.sample_sets].prod(dim=1)
    tables = tuple(table.clone().requires_grad_() for table in toy.tables)
    values = None if critic is None else _mean_directions(toy, set_probabilities, *critic)
    logprobs, expectations = toy.logprobs_by(tables, values)
    of_sets = PolicyLogprobs(logprobs[toy.sample_sets][:, :, None], None, expectations)  # [sets, n, 1, G]
    weights = set_probabilities.view(-1, *(1,) * (advantages.dim() - 1))
    counts = count_tokens(toy.plan, 1, 1.0, 0.0)  # each set is a step of its own
    loss_terms(of_sets, weights * advantages, counts, 1.0, 0.0).total.backward()
    return torch.cat([table.grad.flatten() for table in tables])


def gradient_of(toy: Toy, objective: Callable[[Tensor], Tensor]) -> Tensor:
    """Gradient of a function of the continuations' probabilities [S] with respect to all logits, by autograd."""
    tables = tuple(table.clone().requires_grad_() for table in toy.tables)
    objective(toy.probabilities_by(tables)).backward()
    return torch.cat([table.grad.flatten() for table in tables])


def _sampled(toy: Toy, sets: Tensor) -> SampledBlocks:
    """The tokens of sample sets, in rows of the same text."""
    return SampledBlocks(toy.plan, toy.tokens[sets][:, :, None], toy.text.expand(len(sets), -1))


def _with_target(toy: Toy, sets: Tensor) -> Tensor:
    """The numbers of sets with the target's behind them, [sets, n + 1]."""
    return torch.cat((sets, torch.full_like(sets[:, :1], toy.num_continuations)), dim=1)


def _prefixes_of_rows(toy: Toy, forest: Forest) -> list[Tensor]:
    """Of each token's rows in a forest of all sample sets the row of its table."""
    members = toy.sample_sets.flatten()
    later = [toy.prefixes(t + 1)[members[level.first]] for t, level in enumerate(forest.levels[:-1])]
    return [torch.zeros(forest.num_anchors, dtype=torch.int64), *later]


def _mean_directions(
    toy: Toy, set_probabilities: Tensor, values: CriticValues, forest: Forest, vectors: Tensor
) -> list[LinearValues]:
    """Directions of each table's rows: of all sample sets, each times its probability, added up."""
    weights = set_probabilities[:, None, None, None, None]
    of_rows = row_directions(replace(values, directions=weights * values.directions), forest)
    prefixes = _prefixes_of_rows(toy, forest)
    parts = of_rows.split([len(rows) for rows in prefixes])
    none = [torch.zeros(len(table), vectors.shape[1], dtype=torch.float64) for table in toy.tables]
    return [
        LinearValues(vectors, start.index_add(0, rows, part))
        for start, rows, part in zip(none, prefixes, parts, strict=True)
    ]
