"""Dataclasses passed between the parts of a training step: rows, rollouts, rewards, log-probabilities, losses.

Shape legend of the whole package (a tensor is written `name [B, P]`):

    B  rows of a micro-batch: packed, fixed-length sequences of raw tokens
    P  tokens in a row                       n  samples per anchor
    K  blocks (anchors) in a row             G  tokens generated per block
    R  rollouts of a row in block-major order, R = K * n, index k * n + j
    N  nodes of a forest's level: what rollouts share, `ebft_mega/forest.py`
    L  layers    T  tapped layers    H  hidden size    V  vocabulary    D  feature size

A *row* is what the papers call a document of a step; a *document* is one source text, of which a row may hold
several. Rollouts are stored as `[B, n, K, G]` (sample before block) wherever they leave the model. Inside, the rows of
a micro-batch share one sequence of S positions: hidden states are `[S, 1, H]` (megatron-core's order).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ebft_mega.forest import Forest

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}  # by their names in a configuration


@dataclass(frozen=True)
class RowDocuments:
    """Where the documents of each row start, for document masking, on the host and on the device."""

    starts: tuple[tuple[int, ...], ...]  # B rows, of each the first position of every document; the first is 0
    token_starts: Tensor  # int64 [B, P], the first position of each token's document

    def split(self, rows: int) -> "tuple[RowDocuments, ...]":
        """Cut into batches of this many rows, the last one maybe smaller."""
        parts = self.token_starts.split(rows)
        return tuple(RowDocuments(self.starts[i * rows : (i + 1) * rows], part) for i, part in enumerate(parts))


@dataclass(frozen=True)
class TokenBatch:
    """Rows of raw text as they leave the loader."""

    tokens: Tensor  # int64 [B, P]
    document_ids: Tensor  # int64 [B, P], number of the source document in the data set
    row_indices: Tensor  # int64 [B], index of each row in the global batch of its step; -1 is filler
    documents: RowDocuments | None = None  # None: documents of a row see each other

    def with_document_masking(self) -> "TokenBatch":
        """The same rows with document masking: neighbouring tokens with equal ids are one document.

        Call it while the rows are in host memory: on a device it would wait for the device.
        """
        changes = self.document_ids[:, 1:] != self.document_ids[:, :-1]
        is_start = F.pad(changes, (1, 0), value=True)
        starts = tuple(tuple(row.nonzero()[:, 0].tolist()) for row in is_start)
        positions = torch.arange(is_start.shape[1], device=is_start.device)
        token_starts = torch.where(is_start, positions, 0).cummax(dim=1).values
        return replace(self, documents=RowDocuments(starts, token_starts))

    def split(self, rows: int) -> "tuple[TokenBatch, ...]":
        """Cut into batches of this many rows, the last one maybe smaller; no rows are no batches."""
        if not len(self.tokens):
            return ()
        fields = (self.tokens, self.document_ids, self.row_indices)
        tokens, ids, indices = (field.split(rows) for field in fields)
        documents = [None] * len(tokens) if self.documents is None else self.documents.split(rows)
        return tuple(TokenBatch(*parts) for parts in zip(tokens, ids, indices, documents, strict=True))

    def filled_up(self, num_rows: int) -> "TokenBatch":
        """Append filler rows (token 0, row index -1), so that all replicas have equally many."""
        missing = num_rows - len(self.tokens)
        tokens, ids = (F.pad(field, (0, 0, 0, missing)) for field in (self.tokens, self.document_ids))
        documents = self.documents
        if documents is not None:
            filler = F.pad(documents.token_starts, (0, 0, 0, missing))
            documents = RowDocuments((*documents.starts, *[(0,)] * missing), filler)
        return TokenBatch(tokens, ids, F.pad(self.row_indices, (0, missing), value=-1), documents)

    def to(self, device: torch.device) -> "TokenBatch":
        """The same rows on another device."""
        documents = self.documents
        if documents is not None:
            documents = replace(documents, token_starts=documents.token_starts.to(device))
        return TokenBatch(self.tokens.to(device), self.document_ids.to(device), self.row_indices.to(device), documents)


@dataclass(frozen=True)
class Rollout:
    """What the policy sampled for the rows of a micro-batch."""

    tokens: Tensor  # int64 [B, n, K, G]
    forest: Forest  # the same, as what begins alike
    # bool [B, K], false where the logits of any token were not all finite; None: it is not known
    finite_blocks: Tensor | None = None


@dataclass(frozen=True)
class TermValues:
    """One term of the reward of every rollout."""

    values: Tensor  # float64 [B, n, K], without the coefficient
    coefficient: float  # below 0 for a penalty
    baseline: str  # which one is unbiased for it: an `extension.reward_term.Baseline`


@dataclass(frozen=True)
class BlockRewards:
    """The reward of every rollout and its terms; alignment and diversity have the factor 2 of the paper's equation 7.

    All of a block with an inner product that is not finite is NaN.
    """

    terms: Mapping[str, TermValues]  # by name; alignment and diversity first, then those of `ebft.reward_terms`
    reward: Tensor  # float64 [B, n, K], the sum of coefficient * values over the terms, in their order
    cfm: Tensor  # float64 [B, K], squared distance of the mean rollout feature to the target feature


@dataclass(frozen=True)
class CriticValues:
    """The token critic's part of an estimate: what it takes off the advantages, and adds as its exact expectation.

    The value of drawing token v is z(v) . q, z the token's vector and q the direction; `ebft_mega/critic/`.
    """

    advantages: Tensor  # float64 [B, n, K, G], less the critic's value of the token that was drawn
    directions: Tensor  # float64 [B, n, K, G, r], q; 0 where a block does not count
    expected: Tensor  # float64 [B, n, K, G], the sum over v of pi(v) z(v) . q; 0 where a block does not count


@dataclass(frozen=True)
class Experience:
    """Rollouts of a micro-batch with their rewards and advantages."""

    rollout: Rollout
    gram: Tensor  # float64 [B, K, n + 1, n + 1]
    rewards: BlockRewards
    advantages: Tensor  # float64 [B, n, K], or [B, n, K, G] one for each token; 0 where a block does not count
    counted_blocks: Tensor | None = None  # bool [B, K], which blocks count; None: all
    critic: CriticValues | None = None  # None: the estimator reads none

    @property
    def counted_reward(self) -> Tensor:
        """Rewards float64 [B, n, K], 0 where a block does not count."""
        reward = self.rewards.reward
        return reward if self.counted_blocks is None else reward.masked_fill(~self.counted_blocks[:, None], 0.0)

    @property
    def loss_inputs(self) -> tuple[Tensor, ...]:
        """What the loss is made from beside log-probabilities, 0 where a block does not count."""
        if self.critic is None:
            return (self.counted_reward,)
        return (self.counted_reward, self.advantages, self.critic.directions)


@dataclass(frozen=True)
class PolicyLogprobs:
    """Log-probabilities under the policy being trained, with gradient."""

    rollout: Tensor | None  # float32 [B, n, K, G] at the sampling temperature; None when rl_coef is 0
    target: (
        Tensor | None
    )  # float32 [B, P - 1] of tokens[:, 1:] at temperature 1; None when ce_coef and entropy_coef are 0
    # float32 [], the sum over all generated tokens of the critic's expected value before each; None: there is no critic
    expected_values: Tensor | None = None
    # float32 [B, P - 1], in nats, of the distributions that predict tokens[:, 1:]; None when entropy_coef is 0
    entropies: Tensor | None = None


@dataclass(frozen=True)
class TokenCounts:
    """Denominators of a step's losses, over the global batch, known before the first forward."""

    rollout_tokens: int
    target_tokens: int


@dataclass(frozen=True)
class LossTerms:
    """A micro-batch's share of the step's losses: sums divided by the global counts, so shares add up."""

    rl: Tensor  # float32 [], value of -advantage * logprob
    ce: Tensor  # float32 []
    total: Tensor  # float32 [], rl_coef * rl + ce_coef * ce - entropy_coef * entropy, with gradient
    entropy: Tensor | None = None  # float32 []; None when entropy_coef is 0


@dataclass(frozen=True)
class Learned:
    """A micro-batch's log-probabilities and loss shares, detached."""

    logprobs: PolicyLogprobs
    terms: LossTerms
