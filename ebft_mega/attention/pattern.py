"""Which query may see which key in one pass: the definition that every attention implementation must equal."""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionPattern:
    """Which queries see which keys, in one pass over rows that carry a document and rollouts of its blocks.

    A document query at position p sees the document keys 0..p. A query of a rollout of block k sees the document
    keys 0..anchors[k]-1 and, of its own rollout, the keys up to its own; it sees no other rollout. Rollouts are
    block-major (rollout k * num_samples + j), and the last of a rollout's keys belongs to the last of its queries.
    With `document_starts` a row holds several documents, of which none sees another: a query at position p sees no key
    before the start of its document, a rollout of block k none before that of the document of position anchors[k] - 1.
    Hashable, so that what is derived from a pattern can be cached under it.
    """

    anchors: tuple[int, ...]  # K, document tokens that each block's rollouts see; increasing, from 1
    num_samples: int  # n, rollouts of each block
    document_queries: tuple[int, ...] | range  # Nd positions of the document rows that ask, increasing
    document_keys: int  # D, document keys there are: positions 0..D-1
    own_queries: int  # Tq: the last Tq tokens of each rollout ask; 0 for none
    own_keys: int  # Tk >= Tq, keys of each rollout
    # B rows, of each the first position of every document, increasing from 0; None: every row is one document. Starts
    # beyond the document keys mean nothing.
    document_starts: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        asking = self.document_queries
        if not _increasing(self.anchors) or (self.anchors and self.anchors[0] < 1):
            raise ValueError(f"anchors must increase from at least 1, not {self.anchors}")
        if not _increasing(asking) or (asking and asking[0] < 0):
            raise ValueError(f"document queries must increase from at least 0, not {asking}")
        needed = max((*(p + 1 for p in asking[-1:]), *self.anchors[-1:] * (self.own_queries > 0)), default=0)
        if self.document_keys < needed:
            raise ValueError(f"{self.document_keys} document keys, but the queries see {needed}")
        if not 0 <= self.own_queries <= self.own_keys:
            raise ValueError(f"{self.own_queries} queries of a rollout with {self.own_keys} keys")
        for starts in self.document_starts or ():
            if starts[:1] != (0,) or not _increasing(starts):
                raise ValueError(f"document starts must increase from 0, not {starts}")

    @property
    def num_rollouts(self) -> int:
        """R = K * n."""
        return len(self.anchors) * self.num_samples

    @property
    def document_limits(self) -> tuple[int, ...]:
        """Nd, how many document keys each document query sees."""
        return tuple(position + 1 for position in self.document_queries)

    @property
    def rollout_limits(self) -> tuple[int, ...]:
        """R, how many document keys each rollout sees."""
        return tuple(anchor for anchor in self.anchors for _ in range(self.num_samples))

    @property
    def seen_from(self) -> tuple[tuple[int, ...], ...]:
        """B rows of Nd + K, the first document key that each document query and each block's rollouts see.

        Without document masking one row that stands for all.
        """
        asking = (*self.document_queries, *(anchor - 1 for anchor in self.anchors))
        if self.document_starts is None:
            return ((0,) * len(asking),)
        return tuple(tuple(starts[bisect_right(starts, p) - 1] for p in asking) for starts in self.document_starts)

    @property
    def num_queries(self) -> int:
        """Nd + R * Tq."""
        return len(self.document_queries) + self.num_rollouts * self.own_queries

    @property
    def num_keys(self) -> int:
        """D + R * Tk."""
        return self.document_keys + self.num_rollouts * self.own_keys

    @property
    def num_pairs(self) -> int:
        """Query-key pairs that are needed, per row and head; with document masking per head, over all rows."""
        hidden_keys = self.own_queries * (self.own_queries - 1) // 2  # own keys in the future of their queries
        own_pairs = self.own_queries * self.own_keys - hidden_keys
        per_row = (
            sum(self.document_limits) + self.own_queries * sum(self.rollout_limits) + self.num_rollouts * own_pairs
        )
        if self.document_starts is None:
            return per_row
        num_document, per_block = len(self.document_queries), self.num_samples * self.own_queries
        hidden = (sum(row[:num_document]) + per_block * sum(row[num_document:]) for row in self.seen_from)
        return per_row * len(self.document_starts) - sum(hidden)

    @property
    def dense_pairs(self) -> int:
        """Query-key pairs of the whole rectangle, per row and head; with document masking per head, over all rows."""
        return self.num_queries * self.num_keys * len(self.document_starts or (None,))

    def mask(self, device: torch.device) -> Tensor:
        """Who sees whom, written out.

        Returns:
            bool [Nd + R * Tq, D + R * Tk], with document masking [B, 1, Nd + R * Tq, D + R * Tk], true where a query
            sees a key; the rollouts' queries and keys in block-major order, the tokens of a rollout next to each other.
        """
        rollouts = torch.arange(self.num_rollouts, device=device)
        limits = torch.tensor(self.document_limits + self.rollout_limits, dtype=torch.int64, device=device)
        repeats = [1] * len(self.document_queries) + [self.own_queries] * self.num_rollouts
        limits = limits.repeat_interleave(torch.tensor(repeats, dtype=torch.int64, device=device))
        document_keys = torch.arange(self.document_keys, device=device)
        sees_document = document_keys < limits[:, None]

        same_rollout = rollouts.repeat_interleave(self.own_queries)[:, None] == rollouts.repeat_interleave(
            self.own_keys
        )
        first = self.own_keys - self.own_queries  # token of a rollout's first query
        query_token = torch.arange(first, self.own_keys, device=device).repeat(self.num_rollouts)
        key_token = torch.arange(self.own_keys, device=device).repeat(self.num_rollouts)
        sees_own = torch.zeros(self.num_queries, same_rollout.shape[1], dtype=torch.bool, device=device)
        sees_own[len(self.document_queries) :] = same_rollout & (key_token <= query_token[:, None])
        if self.document_starts is None:
            return torch.cat((sees_document, sees_own), dim=1)
        sees_document = sees_document & (document_keys >= self.first_keys(device)[:, :, None])  # [B, queries, D]
        return torch.cat((sees_document, sees_own.expand(len(sees_document), -1, -1)), dim=2)[:, None]

    def first_keys(self, device: torch.device) -> Tensor:
        """Of every query the first document key it sees, int64 [B, Nd + R * Tq]; B = 1 without document masking."""
        seen_from = torch.tensor(self.seen_from, dtype=torch.int64, device=device)
        document, blocks = seen_from.split((len(self.document_queries), len(self.anchors)), dim=1)
        return torch.cat((document, blocks.repeat_interleave(self.num_samples * self.own_queries, dim=1)), dim=1)


def _increasing(numbers: tuple[int, ...] | range) -> bool:
    if isinstance(numbers, range):
        return numbers.step > 0 or len(numbers) < 2
    return all(first < second for first, second in pairwise(numbers))
