"""The token critic of a run: used as earlier batches have fitted it, and fitted on a step's rollouts after the step."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ebft_mega.block_plan import BlockPlan
from ebft_mega.critic.critic_terms import Objective, critic_terms
from ebft_mega.critic.regressors import TokenRegressors, token_regressors
from ebft_mega.critic.ridge import CriticWeights, Statistics, solved, step_statistics
from ebft_mega.extension.critic_settings import CriticSettings
from ebft_mega.features.gram import summed
from ebft_mega.features.own_features import OwnFeatures
from ebft_mega.forest import Forest
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.rollout.generate import Sampled
from ebft_mega.types import CriticValues, TokenBatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CriticState:
    """What the critic has learned; the same on every data-parallel rank, of this rank's feature channels."""

    table: Tensor  # float32 [V, r], vectors of tokens, never changed
    statistics: Statistics  # decayed sums over the batches so far
    batches: int  # how many there were
    weights: CriticWeights | None  # None: too few batches


class FittedCritic:
    """The critic that a trainer has; its state changes from step to step, like an optimizer's."""

    def __init__(
        self,
        table: Tensor,
        num_channels: int,
        settings: CriticSettings,
        objective: Objective,
        plan: BlockPlan,
        groups: ProcessGroups,
    ) -> None:
        """Begin with nothing learned.

        Args:
            table: float32 [V, r], of `token_table`, the same on every rank.
            num_channels: D', feature channels of this rank.
        """
        self.settings, self.objective, self.plan, self.groups = settings, objective, plan, groups
        rank = table.shape[1]
        nothing = Statistics.zeros(plan.generate_length, 4 * rank + 1, num_channels, groups.device)
        self.state = CriticState(table.to(groups.device), nothing, 0, None)

    @property
    def table(self) -> Tensor:
        """Vectors of tokens, float32 [V, r]."""
        return self.state.table

    @property
    def rank(self) -> int:
        """r."""
        return self.table.shape[1]

    def of_step(
        self, micro_batches: Sequence[TokenBatch], sampled: Sequence[Sampled], counted_blocks: Sequence[Tensor] | None
    ) -> "CriticStep":
        """What takes in the features of a step's micro-batches."""
        return CriticStep(self, micro_batches, sampled, counted_blocks)

    def restore(self, state: CriticState) -> None:
        """Take over what a checkpoint holds; the weights are solved for anew, which gives the same bits."""
        self.state = CriticState(state.table, state.statistics, state.batches, self._weights_of(state))

    @torch.no_grad()
    def learn(self, step: "CriticStep") -> None:
        """Take in a step's rollouts: the steps that follow use what is known then.

        A step in which no block counts, or something is not finite, adds nothing; neither does one that is skipped, for
        which this is not called.

        Communication: that of `Statistics.over_replicas`, and one all-reduce of a number over the replica, for which
            the host waits.
        """
        new = step.statistics.over_replicas(self.groups.data_parallel)
        count = new.squares[0, -self.rank - 1, -self.rank - 1]  # of the constant regressor
        usable = (count > 0) & new.squares.isfinite().all() & new.products.isfinite().all()
        flag = usable.to(torch.int32)
        if dist.get_world_size(self.groups.model_parallel) > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self.groups.model_parallel)
        if not flag.item():
            logger.info("the token critic learns nothing from this step: no block counts, or some number is not finite")
            return
        old = self.state
        state = CriticState(
            old.table, new if not old.batches else old.statistics.plus(new, self.settings.decay), old.batches + 1, None
        )
        self.restore(state)

    def _weights_of(self, state: CriticState) -> CriticWeights | None:
        settings = self.settings
        if state.batches < settings.warmup_batches:
            return None
        return solved(state.statistics, self.rank, settings.prefix_ridge, settings.token_ridge)


@dataclass
class CriticStep:
    """A step's rollouts as the critic sees them, micro-batch by micro-batch."""

    critic: FittedCritic
    micro_batches: Sequence[TokenBatch]
    sampled: Sequence[Sampled]
    counted_blocks: Sequence[Tensor] | None  # bool [B, K] each; None: all count
    values: list[CriticValues | None] = field(default_factory=list)  # None: the critic is not used yet
    _statistics: Statistics | None = None

    @property
    def statistics(self) -> Statistics:
        """Sums over the rollouts of this replica that count."""
        assert self._statistics is not None, "a step has at least one micro-batch"
        return self._statistics

    @torch.no_grad()
    def take(self, index: int, features: OwnFeatures) -> None:
        """Take in a micro-batch's features, in order.

        Communication: once the critic is used, one all-reduce of B * n * K * G * (1 + r) float64 over the replica.
        """
        sampled, critic = self.sampled[index], self.critic
        assert sampled.means is not None, "the sampling notes the means that the critic needs"
        tokens, counted = self.micro_batches[index].tokens, None
        if self.counted_blocks is not None:
            counted = self.counted_blocks[index]
        forest = sampled.rollout.forest
        regressors = token_regressors(forest, sampled.means, tokens, critic.table, critic.plan)
        self._add(step_statistics(regressors, features, counted))
        weights = critic.state.weights
        if weights is None:
            self.values.append(None)
            return
        terms = summed(critic_terms(features, regressors, weights, critic.objective), critic.groups.model_parallel)
        self.values.append(_critic_values(terms, regressors, sampled.means, forest, counted))

    def _add(self, new: Statistics) -> None:
        if self._statistics is None:
            self._statistics = new
        else:
            self._statistics.take_in(new)


def _critic_values(
    terms: Tensor,
    regressors: Sequence[TokenRegressors],
    means: Sequence[Tensor],
    forest: Forest,
    counted: Tensor | None,
) -> CriticValues:
    """By row and sample what `critic_terms` has by block, and the directions' expected values.

    Args:
        terms: float64 [B * K, n, G, 1 + r], whole.
    """
    if counted is not None:
        terms = terms.masked_fill(~counted.flatten()[:, None, None, None], 0.0)
    of_rollouts = [item.spread_before(mean.to(torch.float64)) for mean, item in zip(means, regressors, strict=True)]
    expected = (torch.stack(of_rollouts, dim=2) * terms[..., 1:]).sum(dim=-1)
    if counted is not None:
        expected = expected.masked_fill(~counted.flatten()[:, None, None], 0.0)

    def by_sample(values: Tensor) -> Tensor:
        """[B * K, n, G, ...] -> [B, n, K, G, ...]."""
        return values.unflatten(0, (forest.num_rows, -1)).transpose(1, 2)

    return CriticValues(by_sample(terms[..., 0]), by_sample(terms[..., 1:]), by_sample(expected))


def row_directions(values: CriticValues, forest: Forest) -> Tensor:
    """Directions of the rows that tokens are drawn from: those of the rollouts that share a row added up.

    Returns:
        float64 [rows, r], in the order of `Sampled.means`: of the anchors, then of the prefixes of each level.
    Communication: none.
    """
    first, *later = values.directions.transpose(1, 2).flatten(0, 1).unbind(dim=2)  # [B * K, n, r] each
    return torch.cat(
        [first.sum(dim=1), *(level.summed(each) for level, each in zip(forest.levels, later, strict=False))]
    )
