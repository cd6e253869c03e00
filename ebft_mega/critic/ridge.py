"""Ridge regressions of features still to come, one for each generated token: statistics and solution, in float64."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ebft_mega.critic.regressors import TokenRegressors
from ebft_mega.features.gram import summed
from ebft_mega.features.own_features import OwnFeatures


@dataclass(frozen=True)
class Statistics:
    """Sums over rollouts of what the regressions need: q + r regressors, D' feature channels of this rank."""

    squares: Tensor  # float64 [G, q + r, q + r], sum of x x^T
    products: Tensor  # float64 [G, q + r, D'], sum of x F^T

    @classmethod
    def zeros(cls, num_tokens: int, num_regressors: int, num_channels: int, device: torch.device) -> "Statistics":
        """Of no rollouts."""
        shapes = (num_tokens, num_regressors, num_regressors), (num_tokens, num_regressors, num_channels)
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def plus(self, other: "Statistics", decay: float) -> "Statistics":
        """These, decayed, and others."""
        sums = ((other.squares, self.squares), (other.products, self.products))
        return Statistics(*(torch.add(new, old, alpha=decay) for new, old in sums))

    def take_in(self, other: "Statistics") -> None:
        """Add others, in place."""
        self.squares.add_(other.squares)
        self.products.add_(other.products)

    def over_replicas(self, group: dist.ProcessGroup) -> "Statistics":
        """The sums over a data-parallel group, the same bits on all of its ranks; these are used up.

        Communication: two all-reduces, of G * (q + r)^2 and of G * (q + r) * D' float64. (The order of a sum may follow
            the length of what is summed, which is not the same on all stages; squares are the same bits on all.)
        """
        products = summed(self.products, group) if self.products.numel() else self.products
        return Statistics(summed(self.squares, group), products)


@dataclass(frozen=True)
class CriticWeights:
    """The regressions' solution, of this rank's feature channels."""

    prefix: Tensor  # W, float64 [G, q, D']
    token: Tensor  # M, float64 [G, r, D']


def step_statistics(
    regressors: Sequence[TokenRegressors], features: OwnFeatures, counted_blocks: Tensor | None
) -> Statistics:
    """The sums over a micro-batch's rollouts.

    Rollouts that begin alike have equal regressors, so features are added up by prefix first.

    Args:
        counted_blocks: bool [B, K], blocks whose rollouts count; None: all.
    Communication: none.
    """
    counted = regressors[0].level.of_rollout.new_ones(regressors[0].level.of_rollout.shape[0], dtype=torch.bool)
    if counted_blocks is not None:
        counted = counted_blocks.flatten()
    first, channels = regressors[0], features.vectors.shape[-1]
    width = first.prefix.shape[1]
    found = Statistics.zeros(len(regressors), width + first.token.shape[1], channels, first.token.device)
    steps = list(zip(regressors, found.squares, found.products, strict=True))
    for (item, squares, products), to_come in zip(reversed(steps), features.to_come(), strict=True):
        ones = counted[:, None, None].expand(-1, to_come.shape[1], 1).to(torch.float64)
        spread = item.level.spread(item.token)
        if counted_blocks is not None:  # what does not count may be anything
            to_come = to_come.masked_fill(~counted[:, None, None], 0.0)
            spread = spread.masked_fill(~counted[:, None, None], 0.0)
        count_before, count = item.summed_before(ones), item.level.summed(ones)
        prefix, token = item.prefix, item.token
        if counted_blocks is not None:
            prefix, token = prefix.masked_fill(count_before == 0, 0.0), token.masked_fill(count == 0, 0.0)
        crossed = prefix.T @ item.summed_before(spread)
        squares[:width, :width] = prefix.T @ (count_before * prefix)
        squares[:width, width:], squares[width:, :width] = crossed, crossed.T
        squares[width:, width:] = token.T @ (count * token)
        products[:width] = prefix.T @ item.summed_before(to_come)
        products[width:] = token.T @ item.level.summed(to_come)
    return found


def solved(statistics: Statistics, rank: int, prefix_ridge: float, token_ridge: float) -> CriticWeights:
    """Solve the normal equations (S + R) B = C of every token.

    R is diagonal: on each of the two blocks of regressors its ridge times the mean of the block's squares.

    Args:
        rank: r, regressors of the token, behind those of the prefix.
    Raises:
        torch.linalg.LinAlgError: the statistics are not finite.
    Communication: none.
    """
    diagonal = statistics.squares.diagonal(dim1=-2, dim2=-1)
    width = diagonal.shape[-1] - rank
    blocks = (diagonal[:, :width], prefix_ridge), (diagonal[:, width:], token_ridge)
    smallest = torch.finfo(torch.float64).tiny  # a block that is zero throughout keeps its equations solvable
    ridge = torch.cat(
        [(ridge * part.mean(dim=-1, keepdim=True)).clamp(min=smallest).expand_as(part) for part, ridge in blocks],
        dim=-1,
    )
    factor = torch.linalg.cholesky(statistics.squares + torch.diag_embed(ridge))
    weights = torch.cholesky_solve(statistics.products, factor)
    return CriticWeights(weights[:, :width].contiguous(), weights[:, width:].contiguous())
