"""Bytes of the token critic on one rank, from sizes alone. No torch.

r numbers of a token's vector, k = 4 r + 1 regressors of which q = 3 r + 1 are of the prefix, D' channels of features on
this rank, V the vocabulary; R = B K n rollouts of a micro-batch, N = B K (1 + n (G - 1)) rows of logits that their
tokens are drawn from, m micro-batches. No two rollouts are taken to begin alike.
"""

from dataclasses import dataclass

FLOAT32_BYTES, FLOAT64_BYTES = 4, 8


@dataclass(frozen=True)
class CriticMemory:
    """The sizes that the critic's bytes follow from."""

    vocab_size: int
    rank: int  # r
    channels: int  # D'
    generate_length: int  # G
    num_samples: int  # n
    num_anchors: int  # B * K, of a micro-batch
    num_micro_batches: int  # m
    is_mean_of_tokens: bool  # the feature map's
    own_rows: int = 0  # of a copy of the table with this rank's rows and padding; 0: they are a part of it

    @property
    def regressors(self) -> int:
        """k."""
        return 4 * self.rank + 1

    @property
    def rollouts(self) -> int:
        """R."""
        return self.num_anchors * self.num_samples

    @property
    def drawn_rows(self) -> int:
        """N."""
        return self.num_anchors * (1 + self.num_samples * (self.generate_length - 1))

    @property
    def statistics_bytes(self) -> int:
        """8 G k (k + D')."""
        return FLOAT64_BYTES * self.generate_length * self.regressors * (self.regressors + self.channels)

    @property
    def weights_bytes(self) -> int:
        """8 G k D'."""
        return FLOAT64_BYTES * self.generate_length * self.regressors * self.channels

    @property
    def state_bytes(self) -> int:
        """Between steps: the table, 4 V r, statistics and weights."""
        return FLOAT32_BYTES * self.vocab_size * self.rank + self.statistics_bytes + self.weights_bytes

    @property
    def table_bytes(self) -> int:
        """4 r for each row of the copy."""
        return FLOAT32_BYTES * self.own_rows * self.rank

    @property
    def means_bytes(self) -> int:
        """Mean vectors of all micro-batches, from the sampling to the end of the step: m 4 N r."""
        return self.num_micro_batches * FLOAT32_BYTES * self.drawn_rows * self.rank

    @property
    def values_bytes(self) -> int:
        """A, q and expected values of one micro-batch, to the end of the step: 8 R G (r + 2)."""
        return FLOAT64_BYTES * self.rollouts * self.generate_length * (self.rank + 2)

    @property
    def directions_bytes(self) -> int:
        """q of all rows of logits, through the gradient pass: m 8 N r."""
        return self.num_micro_batches * FLOAT64_BYTES * self.drawn_rows * self.rank

    @property
    def taking_bytes(self) -> int:
        """The last micro-batch is taken in, beside what is held: regressors, and the larger of two moments.

        Regressors 8 (N q + R G r). The sums over rollouts: statistics and 4 D' numbers of every rollout (2 D' where all
        features are still to come). The terms: 4 D' + 2 G r + 2 n G (at least 4 G r) numbers of every rollout; and
        statistics that are not held yet.
        """
        of_tokens = self.generate_length * self.rank
        regressors = self.drawn_rows * (self.regressors - self.rank) + self.rollouts * of_tokens
        copies = 4 if self.is_mean_of_tokens else 2
        sums = copies * self.rollouts * self.channels * FLOAT64_BYTES + self.statistics_bytes
        each = 4 * self.channels + 2 * of_tokens + 2 * self.num_samples * self.generate_length
        terms = self.rollouts * max(each, 4 * of_tokens) * FLOAT64_BYTES
        if self.num_micro_batches == 1:
            terms += self.statistics_bytes
        return regressors * FLOAT64_BYTES + max(sums, terms)

    def held_bytes(self, micro_batches: int) -> int:
        """Mean vectors, values of so many micro-batches and, if there are any, the step's statistics."""
        statistics = self.statistics_bytes if micro_batches else 0
        return self.means_bytes + micro_batches * self.values_bytes + statistics

    @property
    def learning_bytes(self) -> int:
        """The update, beside what is held: new statistics, and factors and twice the weights, 8 G k (k + 2 D')."""
        solved = self.generate_length * self.regressors * (self.regressors + 2 * self.channels)
        return self.statistics_bytes + FLOAT64_BYTES * solved
