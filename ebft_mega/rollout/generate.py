"""Sample rollouts from all anchors at once: one pass over the document, then one token of every node per pass."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ebft_mega.architecture.vocabulary_blocks import HEAD_ROWS
from ebft_mega.block_plan import BlockPlan
from ebft_mega.config.schema import Reuse, RunConfig
from ebft_mega.forest import Forest
from ebft_mega.model.head import RowScores, score_rows
from ebft_mega.model.saved_activations import SavedInputs
from ebft_mega.model.stage import PipelinedModel, Stage
from ebft_mega.model.strided_attention import KeyValueCache, StridedLayout
from ebft_mega.parallel.pipeline import Slot, run_ring, share_from_last_stage
from ebft_mega.rollout.forward import SavedForward, logprobs_of_rollouts
from ebft_mega.rollout.noise import noise_keys
from ebft_mega.rollout.packed_order import anchor_rows, continuations, document_positions, node_positions, stem_rows
from ebft_mega.rollout.sampling import drawn_from_finite, sample_tokens, without_marks
from ebft_mega.types import Rollout, TokenBatch


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn, in training and in evaluation."""

    seed: int
    temperature: float
    top_p: float
    merge_equal_prefixes: bool = True

    @classmethod
    def of(cls, config: RunConfig) -> "SamplingSettings":
        """The sampling of a run."""
        ebft = config.ebft
        return cls(config.seed, ebft.temperature, ebft.top_p, ebft.merge_equal_prefixes)


@dataclass(frozen=True)
class Sampled:
    """A micro-batch's rollouts, and the saved forward pass that sampled them."""

    rollout: Rollout
    saved: SavedForward | None  # None: nothing was saved
    logprobs: Tensor | None = None  # float32 [B, n, K, G] at the sampling temperature; None: not asked for
    # Of each token the mean vector of what could have been drawn, float32 [rows, r] of the B * K anchors, then of the
    # prefixes of each level that was fed back; None: not asked for.
    means: tuple[Tensor, ...] | None = None


def generate_rollouts(
    model: PipelinedModel,
    micro_batches: Sequence[TokenBatch],
    plan: BlockPlan,
    sampling: SamplingSettings,
    step: int,
    reuse: Reuse = "off",
    with_targets: bool = False,
    with_logprobs: bool = False,
    table: Tensor | None = None,
) -> list[Sampled]:
    """Sample n continuations of G tokens from every anchor of every row.

    The document prefix is processed once; its keys and values serve all samples. The first token comes from the
    logits at `anchor - 1`, so G tokens cost one document pass and G - 1 decode passes of the nodes so far: at most
    K * n for each row, fewer where rollouts begin alike (`ebft_mega/forest.py`). Pipeline
    stages work on different micro-batches at the same time; nothing is flushed between passes. With document masking a
    rollout continues the document that the token before its anchor belongs to, and sees nothing of the others.

    Args:
        model: the policy with whole parameters; recording gradients if `reuse` is `activations`.
        step: optimizer step, part of the sampling noise.
        reuse: what to save for the gradient pass.
        with_targets: the gradient pass will also score the row's own tokens: the document pass reads on to P - 1.
        with_logprobs: the log-probabilities of what is drawn are wanted. Where a forward pass is saved they are noted
            anyway; otherwise they take one normaliser of each row of logits more.
        table: float32 [V, r], a vector of each token, whose means under the distributions that are sampled from are
            wanted (`Sampled.means`); None: none are.
    Returns:
        Per micro-batch the rollout, the same on every rank of the replica, and what this stage saved; tokens are a
        pure function of (weights, row, seed, step, row index, sample, block, token index). Logits that are not finite
        give tokens, too, and a mark of their block.
    Communication: that of the layers and of `sample_tokens`, and of `score_rows` if something is saved or
        log-probabilities are wanted; along the pipeline hidden states, the tokens of each pass from the last stage to
        all others, which grow the same forest of them, and one broadcast of the last tokens, with another one each of
        all log-probabilities and of all means (r numbers a row) if they are wanted.
        The host waits for the device once per pass (`forest.read_counts`).
    Memory: keys and values of the micro-batches under way, logits of `HEAD_ROWS` rows, and what is saved of all.
    Source: EBFT paper (arXiv 2603.12248), strided mode.
    """
    decoding = _Decoding(model, micro_batches, plan, sampling, step, reuse, with_targets, with_logprobs, table)
    run_ring(
        model.groups,
        len(micro_batches),
        decoding.run,
        decoding.hidden_buffer,
        num_passes=plan.generate_length,
        returned_buffer=decoding.tokens_buffer,
        take_returned=decoding.take_tokens,
    )
    forests = decoding.whole_forests()
    logprobs = decoding.logprobs(forests) if with_logprobs else [None] * len(micro_batches)
    means = [None] * len(micro_batches) if table is None else decoding.means(forests, table.shape[1])
    saved = [None if reuse == "off" else part for part in decoding.saved]
    return [
        Sampled(Rollout(forest.rollouts(), forest, finite), part, scores, mean)
        for forest, finite, part, scores, mean in zip(forests, decoding.finite, saved, logprobs, means, strict=True)
    ]


class _Decoding:
    """This stage's decoding: pass 0 reads the document, pass t feeds back token t - 1 of every rollout."""

    def __init__(
        self,
        model: PipelinedModel,
        micro_batches: Sequence[TokenBatch],
        plan: BlockPlan,
        sampling: SamplingSettings,
        step: int,
        reuse: Reuse,
        with_targets: bool,
        with_logprobs: bool,
        table: Tensor | None,
    ):
        self.model, self.micro_batches, self.plan = model, micro_batches, plan
        self.sampling, self.step, self.reuse = sampling, step, reuse
        self.scores_drawn = reuse != "off" or with_logprobs or table is not None
        self.table = None if table is None else model.vocabulary.own_rows(table)
        # The last block's context, or all that predicts a token of the row; nothing beyond it is read.
        self.document_length = plan.document_length(with_targets)
        self.caches: dict[int, KeyValueCache] = {}  # of the micro-batches that are under way
        self.saved = [SavedForward() for _ in micro_batches]
        self.last_tokens: list[Tensor] = []  # last stage: the last token of each rollout, marked, by micro-batch
        self.finite = [
            batch.tokens.new_ones((len(batch.tokens), plan.num_blocks), dtype=torch.bool) for batch in micro_batches
        ]
        merges = sampling.merge_equal_prefixes
        self.forests = [
            Forest(
                *(len(batch.tokens), plan.num_blocks, plan.num_samples, merges),
                continuations=continuations(batch, plan, self.document_length) if merges else None,
            )
            for batch in micro_batches
        ]
        self.document_rows: dict[int, Tensor] = {}  # last stage: of the micro-batches under way, [B * D, H]
        self._drawn: list[list[Tensor]] = [[] for _ in micro_batches]  # [B, n, K] each: what is not in the forest yet

    def take_tokens(self, slot: Slot, marked: Tensor) -> None:
        """Note what was drawn in a slot, on every stage: int64 [B, n, K], marked (`sample_tokens`)."""
        self.finite[slot.micro_batch] &= drawn_from_finite(marked).all(dim=1)
        self._drawn[slot.micro_batch].append(without_marks(marked))

    def forest(self, index: int, num_levels: int) -> Forest:
        """A micro-batch's forest, grown to so many levels: the host waits for the tokens when it needs them."""
        while len(self.forests[index].levels) < num_levels:
            self.forests[index] = self.forests[index].extended(self._drawn[index].pop(0))
        return self.forests[index]

    def whole_forests(self) -> list[Forest]:
        """After the last pass, the rollouts of all micro-batches, on every stage; one broadcast of the last tokens."""
        count, last = len(self.micro_batches), self.plan.generate_length - 1
        shapes = [self.tokens_shape(index) for index in range(count)]
        for index, tokens in enumerate(share_from_last_stage(self.last_tokens, shapes, torch.int64, self.model.groups)):
            self.take_tokens(Slot(index, last), tokens)
        return [self.forest(index, last + 1) for index in range(count)]

    def logprobs(self, forests: Sequence[Forest]) -> list[Tensor | None]:
        """Log-probabilities of the rollouts of all micro-batches, on every stage; one broadcast."""
        of_rollouts = [
            logprobs_of_rollouts([score.logprobs for score in part.scores], forest) if part.scores else torch.empty(0)
            for part, forest in zip(self.saved, forests, strict=True)
        ]
        shapes = [(*self.tokens_shape(index), self.plan.generate_length) for index in range(len(forests))]
        return [*share_from_last_stage(of_rollouts, shapes, torch.float32, self.model.groups)]

    def means(self, forests: Sequence[Forest], size: int) -> list[tuple[Tensor, ...] | None]:
        """Mean vectors of all rows that tokens were drawn from, on every stage; one broadcast.

        Args:
            size: r.
        """
        own = [score.means for part in self.saved for score in part.scores if score.means is not None]
        rows = [[forest.num_anchors, *(len(level.first) for level in forest.levels[:-1])] for forest in forests]
        shapes = [(count, size) for counts in rows for count in counts]
        dtype = torch.promote_types(self.model.hidden.dtype, torch.float32)
        shared = iter(share_from_last_stage(own, shapes, dtype, self.model.groups))
        return [tuple(next(shared) for _ in counts) for counts in rows]

    def run(self, slot: Slot, received: Tensor | None) -> Tensor:
        """One pass of one micro-batch through this stage."""
        if slot.pass_index == 0:
            self.caches[slot.micro_batch] = KeyValueCache()
        output: Tensor = self.model.run(lambda stage: self._pass(stage, slot, received))
        if slot.pass_index == self.plan.generate_length - 1:
            del self.caches[slot.micro_batch]
            self.document_rows.pop(slot.micro_batch, None)
            if self.model.groups.is_last_stage:
                self.last_tokens.append(output)
        return output

    def _pass(self, stage: Stage, slot: Slot, received: Tensor | None) -> Tensor:
        plan, batch, forest = self.plan, self.micro_batches[slot.micro_batch], self.forest(*_levels(slot))
        document_length = self.document_length if slot.pass_index == 0 else 0
        if slot.pass_index == 0:
            tokens = batch.tokens[:, :document_length].reshape(1, -1)
            positions = document_positions(len(batch.tokens), document_length, tokens.device, batch.documents)
        else:
            tokens = forest.node_tokens(-1)[None]
            positions = node_positions(plan, forest.levels[-1], batch.documents)
        layout = StridedLayout.of(
            plan,
            stage.attention,
            num_rows=len(batch.tokens),
            document_length=document_length,
            forest=forest,
            new_levels=min(slot.pass_index, 1),
            cache=self.caches[slot.micro_batch],
            documents=batch.documents,
        )
        hidden = self._hidden_states(stage, slot, tokens if received is None else received, positions, layout)
        if not stage.shape.has_head:
            return hidden
        with torch.no_grad():
            rows = stage.whole_sequence(hidden, len(positions))[:, 0]
            if slot.pass_index == 0:
                self.document_rows[slot.micro_batch] = rows.detach()
                rows = rows[anchor_rows(plan, len(batch.tokens), document_length, rows.device)]
            else:
                level, document = forest.levels[-1], self.document_rows[slot.micro_batch]
                rows = level.joined(rows, document[stem_rows(plan, level, self.document_length)])
            return self._draw(stage, slot, rows, forest)

    def _hidden_states(
        self, stage: Stage, slot: Slot, entering: Tensor, positions: Tensor, layout: StridedLayout
    ) -> Tensor:
        """Run the layers and save what the gradient pass will reuse."""
        saved = self.saved[slot.micro_batch]
        saved.pass_lengths.append(len(positions))
        if self.reuse == "checkpoints" and saved.inputs is None:
            saved.inputs = SavedInputs(stage.shape.num_layers, has_output=stage.shape.has_head)
        if self.reuse == "activations" and not stage.shape.has_embedding:
            saved.entering.append(entering.requires_grad_())
        hidden = stage.hidden_states(entering, positions, layout, saved.inputs)
        if self.reuse == "activations":
            saved.leaving.append(hidden)
        return hidden

    def _draw(self, stage: Stage, slot: Slot, rows: Tensor, forest: Forest) -> Tensor:
        """Sample the next token of every rollout from its row, a few anchors at a time.

        Args:
            rows: [B * K or M, H] before the final norm, of the anchors or of the last level's prefixes, the same on
                every tensor-parallel rank.
        Returns:
            int64 [B, n, K], marked (`sample_tokens`).
        """
        plan, sampling, own_slice = self.plan, self.sampling, self.model.vocabulary
        samples, row_indices = plan.num_samples, self.micro_batches[slot.micro_batch].row_indices
        keys = noise_keys(sampling.seed, self.step, row_indices, samples, plan.num_blocks, slot.pass_index)
        by_anchor = keys.transpose(1, 2).reshape(-1, samples)  # [B * K, n]
        level = forest.levels[-1] if forest.levels else None
        starts = range(len(rows) + 1) if level is None else level.prefix_starts
        drawn, scores = [], []
        for first, end in _anchors_at_once(len(by_anchor), 1 if level is None else samples):
            own = slice(starts[first], starts[end])  # of the rows
            if level is None:
                anchors = torch.arange(end - first, device=rows.device)
                row_of_rollout = anchors[:, None].expand(-1, samples)
            else:
                anchors, row_of_rollout = level.anchors[own] - first, level.of_rollout[first:end] - own.start
            logits = stage.logits(rows[own])
            tokens = sample_tokens(
                logits, row_of_rollout, by_anchor[first:end], sampling.temperature, sampling.top_p, own_slice
            )
            drawn.append(tokens)
            if self.scores_drawn:
                temperature = torch.full((len(logits),), sampling.temperature, dtype=torch.float64, device=rows.device)
                scores.append(score_rows(logits, without_marks(tokens)[anchors], temperature, own_slice, self.table))
        if scores:
            self.saved[slot.micro_batch].scores.append(RowScores.joined(scores))
        return torch.cat(drawn).unflatten(0, (len(row_indices), -1)).transpose(1, 2)

    def hidden_buffer(self, slot: Slot) -> Tensor:
        """For the hidden states of the documents or of the last level's nodes."""
        forest = self.forest(*_levels(slot))
        if slot.pass_index == 0:
            return self.model.hidden.empty(forest.num_rows * self.document_length)
        return self.model.hidden.empty(len(forest.levels[-1]))

    def tokens_buffer(self, slot: Slot) -> Tensor:
        """For one token of every rollout."""
        return self.micro_batches[slot.micro_batch].tokens.new_empty(self.tokens_shape(slot.micro_batch))

    def tokens_shape(self, index: int) -> tuple[int, int, int]:
        """B, n, K of a micro-batch."""
        return len(self.micro_batches[index].tokens), self.plan.num_samples, self.plan.num_blocks


def _levels(slot: Slot) -> tuple[int, int]:
    """The micro-batch of a slot, and the levels that there are in its pass."""
    return slot.micro_batch, slot.pass_index


def _anchors_at_once(num_anchors: int, rows_each: int) -> Iterator[tuple[int, int]]:
    """Cut anchors into runs of at most `HEAD_ROWS` rows, or of one anchor.

    Args:
        rows_each: most rows that an anchor can have. Runs do not depend on how many it has: each is one call of the
            head, and with partitioned parameters all replicas must make equally many.
    """
    together = max(1, HEAD_ROWS // rows_each)
    for first in range(0, num_anchors, together):
        yield first, min(first + together, num_anchors)
