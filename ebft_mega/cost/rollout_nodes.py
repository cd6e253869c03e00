"""How many rows rollouts are: what rollouts of an anchor begin with alike is one row (`ebft_mega/forest.py`).

A *prefix* is the first t + 1 tokens of one or more rollouts of an anchor; all prefixes of one t are a level. A prefix
that continues as the document does is a *stem*, whose row is the document's own; the others are *nodes*, rows that
passes compute. Levels 0 to G - 2 go through the policy, all G through the feature network; the head draws from every
prefix of levels 0 to G - 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ebft_mega.block_plan import BlockPlan

# Shares that were read off a table are rounded to two digits.
ROUNDING = 0.01


@dataclass(frozen=True)
class DistinctShares:
    """Rows of rollouts that are computed, as shares of what they would be if nothing were merged."""

    features: float  # nodes of all levels
    policy: float | None = None  # nodes of levels 0 to G - 2; None: as `features`, and where G is 1 there are none
    head: float | None = None  # prefixes of levels 0 to G - 2; None: as `policy`, so no stems

    def by_level(self, plan: BlockPlan) -> tuple[float, ...]:
        """Shares of nodes on the G levels that have these means: all but the last level are taken to be equal.

        Nodes become more from level to level, so no share is less than that of the levels before.

        Raises:
            ValueError: no rollouts have such shares, even if these were rounded to two digits.
        """
        fed = plan.generate_length - 1
        first = self.features if self.policy is None or fed == 0 else self.policy
        last = self.features * (fed + 1) - first * fed
        slack = ROUNDING * (fed + 1)
        for name, share in (("of features", self.features), ("of the policy", first), ("of the head", self.head)):
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"a share {name} lies between 0 and 1, not {share:.6g}")
        if not first - slack <= last <= 1 + slack:
            largest = (first * fed + 1) / (fed + 1)
            raise ValueError(
                f"with a share of the policy of {first:.6g} that of features lies between it and {largest:.4g}, "
                f"not {self.features:.6g}"
            )
        if self.head is not None and self.head < first - ROUNDING:
            raise ValueError(f"a share of the head is not below that of the policy, {first:.6g}: not {self.head:.6g}")
        return (*(first,) * fed, min(1.0, max(first, last)))


Counts = tuple[tuple[float, ...], ...]  # of G levels K numbers; integers where they were counted


@dataclass(frozen=True)
class RolloutNodes:
    """Nodes and prefixes of one row's rollouts by level and block: counted, or expected of shares."""

    nodes: Counts
    prefixes: Counts  # nodes and stems

    @classmethod
    def all_different(cls, plan: BlockPlan) -> "RolloutNodes":
        """Of rollouts that nothing is merged of: n nodes on every level of every block."""
        counts = ((plan.num_samples,) * plan.num_blocks,) * plan.generate_length
        return cls(counts, counts)

    @classmethod
    def of_shares(cls, plan: BlockPlan, shares: DistinctShares | None) -> "RolloutNodes":
        """Nodes and prefixes in those shares, alike in all blocks; None: nothing is merged.

        Raises:
            ValueError: see `DistinctShares.by_level`.
        """
        if shares is None:
            return cls.all_different(plan)
        of_levels = shares.by_level(plan)
        heads = of_levels if shares.head is None else [max(share, shares.head) for share in of_levels]
        nodes, prefixes = (
            tuple((plan.num_samples * share,) * plan.num_blocks for share in levels) for levels in (of_levels, heads)
        )
        return cls(nodes, prefixes)

    @classmethod
    def of_forest(cls, levels: Sequence[Any], num_blocks: int) -> "tuple[RolloutNodes, ...]":
        """Those of each row of a micro-batch.

        Args:
            levels: of a forest (`ebft_mega.forest.Level`): what is read are counts that the host has.
        """
        rows = [slice(first, first + num_blocks) for first in range(0, len(levels[0].counts), num_blocks)]
        return tuple(
            cls(
                tuple(tuple(level.counts[row]) for level in levels),
                tuple(tuple(level.prefix_counts[row]) for level in levels),
            )
            for row in rows
        )

    @classmethod
    def mean(cls, of_rows: "Sequence[RolloutNodes]") -> "RolloutNodes":
        """The mean over rows, by level and block."""
        return cls(_mean([row.nodes for row in of_rows]), _mean([row.prefixes for row in of_rows]))

    def rows(self, levels: range) -> int:
        """Nodes of some levels of all blocks."""
        return _total(self.nodes, levels)

    def head_rows(self, levels: range) -> int:
        """Prefixes of some levels of all blocks."""
        return _total(self.prefixes, levels)

    def pairs(self, plan: BlockPlan, levels: range) -> int:
        """Query-key pairs of each head of some levels.

        A node of level t of block k sees the anchor(k) document tokens before it and t + 1 tokens of its own rollouts,
        of which the document may hold the first ones.
        """
        return round(
            sum(
                count * (anchor + level + 1)
                for level in levels
                for count, anchor in zip(self.nodes[level], plan.anchors, strict=True)
            )
        )

    def document_rows(self, plan: BlockPlan, levels: range) -> tuple[int, int]:
        """Document positions that tokens are drawn from, each once: those before anchors, and stems.

        Returns:
            Their number, and the query-key pairs of each head that they ask for.
        """
        weights: dict[int, float] = {anchor - 1: 1 for anchor in plan.anchors}
        for level in levels:
            for anchor, nodes, prefixes in zip(plan.anchors, self.nodes[level], self.prefixes[level], strict=True):
                position = anchor + level
                weights[position] = min(1, weights.get(position, 0) + prefixes - nodes)
        pairs = sum(weight * (position + 1) for position, weight in weights.items())
        return round(sum(weights.values())), round(pairs)

    def shares(self, plan: BlockPlan) -> DistinctShares:
        """As shares of what they would be if nothing were merged."""
        fed, most = plan.generate_length - 1, plan.rollouts_per_row
        nodes, prefixes = ([sum(counts) / most for counts in table] for table in (self.nodes, self.prefixes))
        features = sum(nodes) / plan.generate_length
        if fed == 0:
            return DistinctShares(features)
        return DistinctShares(features, sum(nodes[:fed]) / fed, sum(prefixes[:fed]) / fed)


def _total(counts: Counts, levels: range) -> int:
    return round(sum(sum(counts[level]) for level in levels))


def _mean(tables: Sequence[Counts]) -> Counts:
    by_level = zip(*tables, strict=True)
    return tuple(tuple(sum(counts) / len(tables) for counts in zip(*level, strict=True)) for level in by_level)
