"""What the token critic predicts from: the tokens before each generated one, and the one that was drawn.

Everything is a function of a prefix, so it is computed once for each distinct one (`ebft_mega/forest.py`). The legend
of shapes is in `ebft_mega/types.py`; r is the size of a token's vector, q = 3 r + 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ebft_mega.block_plan import BlockPlan
from ebft_mega.forest import Forest, Level
from ebft_mega.rollout.packed_order import anchor_positions

PAST_WEIGHT = 0.5  # of the sum of the vectors of the tokens so far
CONSTANT = 3.0  # instead of 1, so that the ridge shrinks it less


@dataclass(frozen=True)
class TokenRegressors:
    """Regressors of one generated token of all rollouts of a micro-batch."""

    before: Level | None  # the prefixes that the token follows; None: it is the first one, each anchor is one
    level: Level  # the prefixes that end with it
    prefix: Tensor  # u, float64 [B * K or M before, q], of the prefixes before
    token: Tensor  # zeta, float64 [M, r], z(token) less its mean under what it was drawn from

    def spread_before(self, values: Tensor) -> Tensor:
        """What every rollout takes from its prefix before the token: [B * K or M before, X] -> [B * K, n, X].

        Of the first token's a view.
        """
        if self.before is None:
            return values[:, None].expand(-1, self.level.num_samples, -1)
        return self.before.spread(values)

    def summed_before(self, values: Tensor) -> Tensor:
        """The sum over the rollouts of each prefix before the token: [B * K, n, X] -> [B * K or M before, X]."""
        return values.sum(dim=1) if self.before is None else self.before.summed(values)


def token_regressors(
    forest: Forest, means: Sequence[Tensor], tokens: Tensor, table: Tensor, plan: BlockPlan
) -> list[TokenRegressors]:
    """Regressors of each of the G tokens.

    u = (mean vector of what could be drawn; vector of the token before; half the sum of these vectors so far; 3).
    Before the first token stands the row's own, before the anchor.

    Args:
        forest: the rollouts, whole.
        means: of each token [B * K or M before, r], as `Sampled.means`.
        tokens: int64 [B, P], the rows.
        table: [V, r].
    Communication: none.
    """
    anchors = anchor_positions(plan, tokens.device)
    last = table[tokens[:, anchors - 1].flatten()].to(torch.float64)  # [B * K, r]
    past = last
    found = []
    before: Level | None = None
    for index, level in enumerate(forest.levels):
        mean = means[index].to(torch.float64)
        constant = mean.new_full((len(mean), 1), CONSTANT)
        own = table[forest.drawn[index].flatten()[level.first]].to(torch.float64)  # [M, r]
        parents = level.anchors if before is None else before.of_rollout.flatten()[level.first]
        prefix = torch.cat((mean, last, PAST_WEIGHT * past, constant), dim=1)
        found.append(TokenRegressors(before, level, prefix, own - mean[parents]))
        last, past, before = own, past[parents] + own, level
    return found
