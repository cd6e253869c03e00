"""The language-model head: logits of selected rows, and log-probabilities and entropies computed in chunks of rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ebft_mega.architecture.vocabulary_blocks import HEAD_ROWS
from ebft_mega.parallel.vocabulary import VocabularySlice

# Smaller log-probabilities belong to probabilities that are 0, in float64 too; they are cut here, as 0 times minus
# infinity (of padding) is no number.
_LEAST_LOGPROB = -1e4


@dataclass(frozen=True)
class RowScores:
    """Log-probabilities of chosen tokens, and the normalisers to recompute the softmax from the logits."""

    logprobs: Tensor  # float32 [N, m] (float64 for float64 logits), m choices from each row of logits
    normalizers: Tensor  # [N], log of the sum of exponentials at the rows' temperature, in the same dtype
    means: Tensor | None = None  # [N, r], mean vector of the next token, in the same dtype; None: not asked for
    entropies: Tensor | None = None  # [N], of the softmax at the rows' temperature, in nats; None: not asked for

    @classmethod
    def joined(cls, parts: Sequence["RowScores"]) -> "RowScores":
        """Scores of rows behind one another; means and entropies of those that have them."""
        means = [part.means for part in parts if part.means is not None]
        entropies = [part.entropies for part in parts if part.entropies is not None]
        return cls(
            torch.cat([part.logprobs for part in parts]),
            torch.cat([part.normalizers for part in parts]),
            torch.cat(means) if means else None,
            torch.cat(entropies) if entropies else None,
        )


@dataclass(frozen=True)
class LinearValues:
    """Values of next tokens that are linear in a vector of each token: z(v) . q for the first rows."""

    table: Tensor  # [width, r], vectors z of this rank's tokens; 0 for padding
    directions: Tensor  # [M, r], q of the first M rows, the same on all tensor-parallel ranks


@dataclass(frozen=True)
class ScoredTokens:
    """Which tokens of which rows are to be scored."""

    tokens: Tensor  # int64 [N, m], ids in [0, V), the same on all tensor-parallel ranks
    temperature: Tensor  # float64 [N], > 0
    known: RowScores | None = None  # of the first rows, from the pass that sampled them
    values: LinearValues | None = None  # whose expectations under the rows' softmax are wanted, too
    # From this row on, behind those with values, the softmax's entropy is wanted, too; None: of no row.
    entropies_from: int | None = None


def score_rows(
    logits: Tensor,
    tokens: Tensor,
    temperature: Tensor,
    own_slice: VocabularySlice,
    table: Tensor | None = None,
    with_entropy: bool = False,
) -> RowScores:
    """Log-probability of chosen tokens under the softmax at a temperature, and its entropy if asked for.

    Args:
        logits: [N, width], this rank's columns, any float dtype, without gradient.
        tokens: int64 [N, m], the same on all ranks. Tokens that a nucleus left out are scored by the full softmax, too.
        temperature: float64 [N]; that of the sampling for rollouts, 1 for targets.
        table: [width, r], a vector of each of this rank's tokens, 0 for padding; None: no means are wanted.
        with_entropy: whether the entropies are wanted.
    Returns:
        RowScores, the same on all ranks; NaN for a row with a logit that is not finite on any of them.
    Communication: with several tensor-parallel ranks two all-reduces, of 4 and of 4 * (1 + m) bytes per row, with a
        table 4 * (1 + m + r), with entropies 4 more (8 bytes a number for float64); none for one rank.
    Memory: a float32 copy of the logits; with entropies for a moment two.
    Source: EBFT paper (arXiv 2603.12248); the authors' code scores at the sampling temperature, in float32.
    """
    assert logits.shape[-1] == own_slice.width, "logits of another vocabulary"
    scaled = _scaled(logits, temperature, own_slice)
    marked = own_slice.has_nan_or_minus_infinity(scaled)
    largest = own_slice.maximum(scaled.amax(dim=-1, keepdim=True))
    scaled -= largest
    column, is_own = own_columns(tokens, own_slice)
    # A token has a finite logit on one rank; the others add 0 and leave its bits alone.
    chosen = scaled.gather(-1, column).masked_fill(~is_own, 0.0)
    exponentials = scaled.exp_()
    mass = exponentials.sum(dim=-1, keepdim=True).masked_fill(marked[:, None], torch.nan)
    parts = [mass, chosen] if table is None else [mass, chosen, exponentials @ table.to(scaled.dtype)]
    if with_entropy:
        parts.append(torch.special.entr(exponentials).sum(dim=-1, keepdim=True))  # -e log e, and 0 where e is 0
    mass, chosen, *weighted = own_slice.sum(torch.cat(parts, dim=-1)).split([part.shape[-1] for part in parts], dim=-1)
    # Of p = e / mass: the sum of -p log p.
    entropies = (weighted.pop() / mass + mass.log())[:, 0] if with_entropy else None
    means = weighted[0] / mass if weighted else None
    return RowScores(chosen - mass.log(), (largest + mass.log())[:, 0], means, entropies)


def gradient_of_logits(
    logits: Tensor,
    tokens: Tensor,
    temperature: Tensor,
    normalizers: Tensor,
    gradient: Tensor,
    own_slice: VocabularySlice,
    slopes: Tensor | None = None,
    entropy: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Gradient of logits from that of log-probabilities, of expectations and of entropies.

    An entropy is the expectation of -log p, whose own change has no mean: values that are constants to the derivative.

    Args:
        logits, tokens, temperature: as for `score_rows`, which gave the `normalizers` [N].
        gradient: [N, m], the whole one on every rank.
        slopes: [N, width], of each row's expectation of a value under the softmax: the expectation's own gradient times
            (value - expectation); None: there are none.
        entropy: the rows' entropies [N] and their gradient [N]; None: there are none, as there are with slopes.
    Returns:
        [N, width] in the logits' dtype, exactly 0 for padding.
    Communication: none.
    """
    column, is_own = own_columns(tokens, own_slice)
    result = _scaled(logits, temperature, own_slice).sub_(normalizers[:, None])  # log-probabilities
    if entropy is not None:
        assert slopes is None, "a row has a value or an entropy"
        of_rows, towards_entropy = (part.to(result.dtype)[:, None] for part in entropy)
        slopes = result.clamp(min=_LEAST_LOGPROB).add_(of_rows).mul_(-towards_entropy)
    result.exp_()  # the softmax
    weights = -gradient.sum(dim=-1, keepdim=True)
    result *= weights if slopes is None else slopes.add_(weights)
    result.scatter_add_(-1, column, gradient.masked_fill(~is_own, 0.0))
    return result.div_(temperature.to(result.dtype)[:, None]).to(logits.dtype)


class VocabularyHead(nn.Module):
    """This tensor-parallel rank's rows of the head's matrix, and what is computed with them."""

    def __init__(self, own_slice: VocabularySlice, hidden_size: int, dtype: torch.dtype, is_embedding: bool):
        """Make the matrix with undefined values.

        Args:
            is_embedding: the weight is the embedding's, which is passed to every call.
        """
        super().__init__()
        self.own_slice = own_slice
        self.weight = None if is_embedding else nn.Parameter(torch.empty(own_slice.width, hidden_size, dtype=dtype))

    def forward(self, rows: Tensor, tied: Tensor | None, scored: ScoredTokens | None = None) -> Tensor:
        """Logits of rows, or log-probabilities of tokens chosen from them.

        Everything goes through this one function because engines make the weight whole around calls of the module.

        Args:
            rows: [N, H] after the final norm, the same on every tensor-parallel rank.
            tied: the embedding's weight where it is the head's, else None.
            scored: the tokens to score; None: logits are wanted.
        Returns:
            Logits [N, width] of this rank's slice in the dtype of the weight, without gradient; or log-probabilities
            float32 [N, m], the same on all ranks, with gradient; with `ScoredTokens.values` one more column, each row's
            expectation, and with `entropies_from` a last one, entropies. Every rank computes the same loss from them,
            so each rank's own upstream gradient is the whole one.
        Communication: for logits none. For log-probabilities that of `score_rows` for the rows that are not known,
            and one all-reduce of the rows' gradient in the backward pass.
        """
        weight = self.weight if tied is None else tied
        assert weight is not None, "a tied head needs the embedding's weight"
        if scored is None:
            with torch.no_grad():
                return F.linear(rows, weight)
        return logprobs_of_rows(rows, weight, scored, self.own_slice)


def logprobs_of_rows(rows: Tensor, weight: Tensor, scored: ScoredTokens, own_slice: VocabularySlice) -> Tensor:
    """Log-probabilities of tokens chosen from rows, computed by chunks of rows.

    Args:
        rows: [N, H]; weight: [width, H].
    Returns:
        float32 [N, m] (float64 for float64 weights). With `ScoredTokens.values` [N, m + 1]: behind them the expectation
        of z(v) . q under each row's softmax, 0 for rows without a direction. With `entropies_from` one more: the
        entropies in nats, 0 for rows before. Rows that are known are not computed in the forward pass.
    Communication: see `VocabularyHead.forward`.
    Memory: logits of at most `HEAD_ROWS` rows, in the dtype of the weight and in float32 (with values or entropies once
        more); a normaliser per row for the backward pass, which makes the logits again; there also one buffer
        of the weight's size.
    """
    logprobs: Tensor = _ChunkedLogprobs.apply(rows, weight, scored, own_slice)
    return logprobs


class _ChunkedLogprobs(torch.autograd.Function):
    """Gradient in closed form instead of recorded: each chunk's logits are freed before the next chunk's are made."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, scored: ScoredTokens, own_slice: VocabularySlice) -> Tensor:
        known, values = scored.known, scored.values
        first, valued = 0 if known is None else len(known.normalizers), 0 if values is None else len(values.directions)
        entropic = len(rows) if scored.entropies_from is None else scored.entropies_from
        assert max(first, valued) <= entropic, "entropies are those of the last rows"
        parts = [] if known is None else [known]
        for chunk in _runs(first, valued, entropic, len(rows)):
            table = values.table if values is not None and chunk.start < valued else None
            logits = F.linear(rows[chunk], weight)
            wanted = table, chunk.start >= entropic
            parts.append(score_rows(logits, scored.tokens[chunk], scored.temperature[chunk], own_slice, *wanted))
        scores = RowScores.joined(parts or [_no_scores(scored)])
        ctx.save_for_backward(rows, weight, scored.tokens, scored.temperature, scores.normalizers)
        ctx.own_slice, ctx.values, ctx.expectations, ctx.entropies = own_slice, values, None, scores.entropies
        ctx.entropic, columns = entropic, [scores.logprobs]
        if values is not None:
            assert scores.means is not None, "rows with a direction have a mean"
            ctx.expectations = (scores.means[:valued] * values.directions.to(scores.means.dtype)).sum(dim=-1)
            columns.append(F.pad(ctx.expectations, (0, len(rows) - valued))[:, None])
        if scored.entropies_from is not None:
            of_last = scores.logprobs.new_empty(0) if scores.entropies is None else scores.entropies
            columns.append(F.pad(of_last, (entropic, 0))[:, None])
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, tokens, temperature, normalizers = ctx.saved_tensors
        values: LinearValues | None = ctx.values
        row_gradient = torch.empty_like(rows)
        # In the weight's own dtype: a matrix product rounds its sum once anyway, this rounds it once per chunk. The
        # error grows with the root of their number (`test_head.py`); a float32 buffer would move thrice the bytes.
        weight_gradient = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        num_choices = tokens.shape[1]
        valued = 0 if values is None else len(values.directions)
        for chunk in _runs(0, valued, ctx.entropic, len(rows)):
            logits = F.linear(rows[chunk], weight)
            slopes = entropy = None
            if values is not None and chunk.start < valued:
                slopes = _slopes(values, chunk, ctx.expectations[chunk], gradient[chunk, num_choices])
            if chunk.start >= ctx.entropic:
                own = slice(chunk.start - ctx.entropic, chunk.stop - ctx.entropic)
                entropy = ctx.entropies[own], gradient[chunk, -1]
            towards_logits = gradient_of_logits(
                logits,
                tokens[chunk],
                temperature[chunk],
                normalizers[chunk],
                gradient[chunk, :num_choices],
                ctx.own_slice,
                slopes,
                entropy,
            )
            row_gradient[chunk] = towards_logits @ weight
            if weight_gradient is not None:
                weight_gradient.addmm_(towards_logits.T, rows[chunk])
            del logits, slopes, towards_logits  # before the next chunk's are made
        return ctx.own_slice.sum(row_gradient), weight_gradient, None, None


def _no_scores(scored: ScoredTokens) -> RowScores:
    """Of no rows."""
    none = scored.temperature.new_empty(0, dtype=torch.float32)
    return RowScores(none.view(0, 1).expand(0, scored.tokens.shape[1]), none)


def _slopes(values: LinearValues, chunk: slice, expectations: Tensor, gradient: Tensor) -> Tensor:
    """Of a chunk of rows, the gradient of each expectation times (value - expectation): [N, width]."""
    dtype = expectations.dtype
    own = values.directions[chunk].to(dtype) @ values.table.to(dtype).T
    return own.sub_(expectations[:, None]).mul_(gradient[:, None].to(dtype))


def _runs(first: int, *ends: int) -> list[slice]:
    """Chunks of the rows from `first` on, none of them across one of the `ends`."""
    bounds = [first, *(max(first, end) for end in ends)]
    return [chunk for start, end in pairwise(bounds) for chunk in _chunks(start, end)]


def _chunks(first: int, end: int) -> list[slice]:
    """Consecutive runs of at most `HEAD_ROWS` rows."""
    return [slice(start, min(start + HEAD_ROWS, end)) for start in range(first, end, HEAD_ROWS)]


def _scaled(logits: Tensor, temperature: Tensor, own_slice: VocabularySlice) -> Tensor:
    """A copy of the logits at their rows' temperatures, without padding."""
    # Cast before the division: bfloat16 has 8 bits of mantissa, a rounded logit of 30 is off by a tenth.
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return own_slice.exclude_padding_(logits.to(dtype) / temperature.to(dtype)[:, None])


def own_columns(tokens: Tensor, own_slice: VocabularySlice) -> tuple[Tensor, Tensor]:
    """Each token's column on this rank (any column if it is another rank's), and whether it is this rank's.

    Args:
        tokens: int64 [N, m], ids in [0, V).
    Returns:
        int64 [N, m] and bool [N, m].
    Communication: none.
    """
    column = tokens - own_slice.first
    is_own = (column >= 0) & (column < own_slice.num_tokens)
    return column.clamp(0, own_slice.width - 1), is_own
