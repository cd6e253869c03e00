"""How many rows rollouts are: those of an anchor that begin alike are one row as long as they do (`forest.py`).

A *node* is the first t + 1 tokens of one or more rollouts of an anchor; all nodes of one t are a level. Levels 0 to
G - 2 go through the policy, all G through the feature network.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ebft_mega.block_plan import BlockPlan

# Shares that were read off a table are rounded to two digits.
ROUNDING = 0.01


@dataclass(frozen=True)
class DistinctShares:
    """Nodes as shares of what they would be if no two rollouts began alike."""

    policy: float | None  # of levels 0 to G - 2; None: there are none, G is 1
    features: float  # of all levels

    def by_level(self, plan: BlockPlan) -> tuple[float, ...]:
        """Shares of the G levels that have these means: all but the last one are taken to be equal.

        Nodes become more from level to level, so no share is less than that of the levels before.

        Raises:
            ValueError: no rollouts have such shares, even if these were rounded to two digits.
        """
        fed, samples = plan.generate_length - 1, plan.num_samples
        first = self.features if self.policy is None or fed == 0 else self.policy
        last = self.features * (fed + 1) - first * fed
        slack = ROUNDING * (fed + 1)
        for name, share in (("of the policy", first), ("of features", self.features)):
            if not 1 / samples - ROUNDING <= share <= 1:
                raise ValueError(f"a share {name} lies between 1 / n = {1 / samples:.4g} and 1, not {share:.6g}")
        if not first - slack <= last <= 1 + slack:
            largest = (first * fed + 1) / (fed + 1)
            raise ValueError(
                f"with a share of the policy of {first:.6g} that of features lies between it and {largest:.4g}, "
                f"not {self.features:.6g}"
            )
        return (*(first,) * fed, min(1.0, max(first, last)))


@dataclass(frozen=True)
class RolloutNodes:
    """Nodes of one row's rollouts by level and block: counted, or expected of shares."""

    by_level: tuple[tuple[float, ...], ...]  # G levels of K numbers; integers where they were counted

    @classmethod
    def all_different(cls, plan: BlockPlan) -> "RolloutNodes":
        """Nodes of rollouts no two of which begin alike: n on every level of every block."""
        return cls(((plan.num_samples,) * plan.num_blocks,) * plan.generate_length)

    @classmethod
    def of_shares(cls, plan: BlockPlan, shares: DistinctShares | None) -> "RolloutNodes":
        """Nodes in those shares, alike in all blocks; None: all different.

        Raises:
            ValueError: see `DistinctShares.by_level`.
        """
        if shares is None:
            return cls.all_different(plan)
        of_levels = shares.by_level(plan)
        return cls(tuple((plan.num_samples * share,) * plan.num_blocks for share in of_levels))

    @classmethod
    def of_rows(cls, counts: Sequence[Sequence[int]], num_blocks: int) -> "tuple[RolloutNodes, ...]":
        """Nodes of each row of a micro-batch.

        Args:
            counts: of every level, of the K anchors of the first row, then of the second, and so on (`Level.counts`).
        """
        rows = len(counts[0]) // num_blocks
        return tuple(
            cls(tuple(tuple(level[row * num_blocks : (row + 1) * num_blocks]) for level in counts))
            for row in range(rows)
        )

    @classmethod
    def mean(cls, of_rows: "Sequence[RolloutNodes]") -> "RolloutNodes":
        """The mean over rows, by level and block."""
        levels = zip(*(nodes.by_level for nodes in of_rows), strict=True)
        return cls(tuple(tuple(sum(counts) / len(of_rows) for counts in zip(*level, strict=True)) for level in levels))

    def rows(self, levels: range) -> int:
        """Nodes of some levels of all blocks."""
        return round(sum(sum(self.by_level[level]) for level in levels))

    def pairs(self, plan: BlockPlan, levels: range) -> int:
        """Query-key pairs of each head of some levels.

        A node of level t of block k sees the anchor(k) document tokens before it and t + 1 tokens of its own path.
        """
        return round(
            sum(
                count * (anchor + level + 1)
                for level in levels
                for count, anchor in zip(self.by_level[level], plan.anchors, strict=True)
            )
        )

    def shares(self, plan: BlockPlan) -> DistinctShares:
        """As shares of what they would be if no two rollouts began alike."""
        levels = plan.generate_length
        of_levels = [sum(counts) / plan.rollouts_per_row for counts in self.by_level]
        policy = sum(of_levels[:-1]) / (levels - 1) if levels > 1 else None
        return DistinctShares(policy, sum(of_levels) / levels)
