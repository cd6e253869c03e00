"""FLOPs of the token critic for one row (`ebft_mega/critic/`), of a step that uses and fits it."""

from dataclasses import dataclass

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.block_plan import BlockPlan
from ebft_mega.config.entries import advantage_estimator, feature_map, tapped_fractions, uses_critic
from ebft_mega.config.schema import RunConfig
from ebft_mega.cost.rollout_nodes import RolloutNodes


@dataclass(frozen=True)
class CriticShape:
    """What the critic's counts depend on beside the rollouts.

    In the formulas below r is the size of a token's vector, q = 3 r + 1 the regressors of a prefix, D the channels of a
    feature, R = K n rollouts of a row, V the vocabulary; B the prefixes that tokens are drawn from, anchors included,
    and M those that end with a token, both on all G levels and each once where rollouts begin alike.
    """

    rank: int  # r
    channels: int  # D, of all tapped layers
    is_mean_of_tokens: bool  # the feature map's
    merges: bool = True  # what rollouts with the same prefix have is added up by products, see `Level.summed`
    rows_of_step: int = 1  # of all replicas: they share the solving

    @classmethod
    def of(
        cls, config: RunConfig, architecture: Architecture, feature_architecture: Architecture
    ) -> "CriticShape | None":
        """The critic of a run; None: it has none."""
        if not uses_critic(config):
            return None
        method, rank = feature_map(config), advantage_estimator(config).critic_settings().rank
        vectors = len(tapped_fractions(config)) * method.vectors(config.ebft.generate_max_len)
        return cls(
            min(rank, architecture.hidden_size),
            vectors * feature_architecture.hidden_size,
            method.is_mean_of_tokens,
            config.ebft.merge_equal_prefixes,
            config.train.global_batch_size,
        )

    @property
    def prefix_regressors(self) -> int:
        """q."""
        return 3 * self.rank + 1

    def vocabulary_flops(self, vocab_size: int, rows: int) -> int:
        """A mean vector, or a value of every token, of each row of logits: 2 V r."""
        return 2 * vocab_size * self.rank * rows

    def statistics_flops(self, plan: BlockPlan, nodes: RolloutNodes) -> int:
        """Sums of squares and products of regressors and features to come, after features are added up by prefix.

        2 B q (q + r + D) + 2 M r (r + D); and to add up 2 R n numbers for each of 1 + D at M's levels, and for each of
        1 + r + D at B's but the first.
        """
        drawn_from, drawn = _prefixes(plan, nodes)
        rank, width, channels = self.rank, self.prefix_regressors, self.channels
        flops = 2 * drawn_from * width * (width + rank + channels) + 2 * drawn * rank * (rank + channels)
        later = plan.generate_length - 1
        return flops + self._adding_flops(plan, later * (1 + rank + channels) + (later + 1) * (1 + channels))

    def terms_flops(self, plan: BlockPlan, nodes: RolloutNodes) -> int:
        """A and q of all rollouts.

        Corrected features and q 4 R G r D; predictions 2 B q D; what lies along w of them 2 R n G D and of features to
        come as much, or where they are not means of tokens 2 R n D; sums over later tokens 2 R G^2 and for means of
        tokens 2 R n G^2.
        """
        drawn_from, _ = _prefixes(plan, nodes)
        length, rollouts, samples = plan.generate_length, plan.rollouts_per_row, plan.num_samples
        flops = 4 * rollouts * length * self.rank * self.channels
        flops += 2 * drawn_from * self.prefix_regressors * self.channels
        features = length if self.is_mean_of_tokens else 1
        flops += 2 * rollouts * samples * (length + features) * self.channels
        sums = 1 + samples if self.is_mean_of_tokens else 1
        return flops + 2 * rollouts * length**2 * sums

    def rows_of_directions_flops(self, plan: BlockPlan) -> int:
        """Adding up q of rollouts that are drawn from the same row: 2 R n r for each token but the first."""
        return self._adding_flops(plan, (plan.generate_length - 1) * self.rank)

    def solving_flops(self, plan: BlockPlan) -> int:
        """A row's share of solving G systems of k = q + r equations by Cholesky factors: k^3 / 3 + 2 k^2 D each.

        Every data-parallel rank solves them for itself.
        """
        size = self.prefix_regressors + self.rank
        each = size**3 // 3 + 2 * size**2 * self.channels
        return plan.generate_length * each // self.rows_of_step

    def _adding_flops(self, plan: BlockPlan, numbers: int) -> int:
        return 2 * plan.rollouts_per_row * plan.num_samples * numbers if self.merges else 0


def _prefixes(plan: BlockPlan, nodes: RolloutNodes) -> tuple[int, int]:
    """B and M."""
    levels = range(plan.generate_length)
    return plan.num_blocks + nodes.head_rows(levels[:-1]), nodes.head_rows(levels)
