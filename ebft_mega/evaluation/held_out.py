"""Held-out evaluation of a policy: cross-entropy, and how close its rollouts are to the text in feature space.

Rollouts are sampled at the training temperature, on fixed rows, with noise that depends only on the seed and the row,
so that two models are compared under the same draws. With document masking, metrics of rollouts are means over the
blocks that lie within one document. A row without such a block has no metrics of rollouts, whatever the model.

What is not finite is left out and counted: marked blocks (`reward/marked_blocks.py`) of the metrics of rollouts, rows
of the cross-entropy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ebft_mega.block_plan import BlockPlan
from ebft_mega.config.schema import RunConfig
from ebft_mega.evaluation.rollout_figures import block_alignment, block_figures, row_means
from ebft_mega.features.network import FeatureNetwork
from ebft_mega.model.stage import PipelinedModel
from ebft_mega.reward.marked_blocks import finite_blocks
from ebft_mega.reward.whitening import Whitening
from ebft_mega.rollout.generate import SamplingSettings, generate_rollouts
from ebft_mega.rollout.packed_order import counted_blocks
from ebft_mega.rollout.score import ScoreRequest, score_without_gradient
from ebft_mega.runtime.exchange import all_gather_values
from ebft_mega.types import Rollout, TokenBatch

# Step number that the sampling noise of evaluations depends on; no training step has it.
EVALUATION_STEP = -1
SHOWN_BLOCKS = 3
CROSS_ENTROPY = "eval/ce_loss"
BATCHES_PER_STAGE = 4  # micro-batches evaluated at a time, for each pipeline stage


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation, the same as those of the training."""

    plan: BlockPlan
    sampling: SamplingSettings
    whitening: Whitening  # of `eval/cfm_loss`; the definitions of the other metrics are fixed
    micro_batch_size: int

    @classmethod
    def of(cls, config: RunConfig) -> "EvaluationSettings":
        """Take the settings from a run's configuration."""
        return cls(
            plan=config.block_plan,
            sampling=SamplingSettings.of(config),
            whitening=config.ebft.reward_whitening,
            micro_batch_size=config.train.micro_batch_size,
        )


@dataclass(frozen=True)
class ShownBlock:
    """A block to be shown to people: token ids of context, target and rollouts."""

    row: int
    block: int
    context: list[int]
    target: list[int]
    rollouts: list[list[int]]
    alignment: list[float]


@dataclass(frozen=True)
class Evaluation:
    """Held-out metrics by `eval/*` name, per row in row order; None where a row does not have the metric."""

    per_row: dict[str, list[float | None]]
    shown: tuple[ShownBlock, ...]
    blocks_left_out: int = 0  # of those that would count; something of them was not finite

    @property
    def rows_left_out(self) -> int:
        """Rows whose cross-entropy is not finite."""
        return self.per_row[CROSS_ENTROPY].count(None)

    @property
    def means(self) -> dict[str, float]:
        """Mean of every metric over the rows that have it, and how much was left out because it is not finite.

        A metric that no row has is left out where no row could have it; NaN where it was left out of all of them.
        """
        means = {}
        for name, values in self.per_row.items():
            known = [value for value in values if value is not None]
            if known:
                means[name] = sum(known) / len(known)
            elif self.rows_left_out if name == CROSS_ENTROPY else self.blocks_left_out:
                means[name] = math.nan
        counts = {"eval/rows_left_out": float(self.rows_left_out)}
        if self.per_row.keys() != {CROSS_ENTROPY}:
            counts["eval/blocks_left_out"] = float(self.blocks_left_out)
        return means | counts


def evaluate(
    policy: PipelinedModel,
    feature_network: FeatureNetwork | None,
    rows: TokenBatch,
    settings: EvaluationSettings,
) -> Evaluation:
    """Evaluate this replica's held-out rows.

    Args:
        policy: the model with whole parameters.
        feature_network: None evaluates the cross-entropy alone.
        rows: held-out rows, `row_indices` counting over all replicas. Replicas with partitioned parameters must have
            equally many (`TokenBatch.filled_up`): every pass gathers. Filler rows are left out of the metrics.
    Returns:
        Evaluation, the same on every rank of the replica.
    Communication: that of `evaluate_chunk`; `gather` puts the replicas together.
    """
    chunks = evaluation_chunks(rows, settings, policy.groups.pipeline_size)
    return merge([evaluate_chunk(policy, feature_network, chunk, settings) for chunk in chunks])


def evaluation_chunks(
    rows: TokenBatch, settings: EvaluationSettings, pipeline_size: int
) -> list[tuple[TokenBatch, ...]]:
    """Cut rows into groups of a few micro-batches: enough at a time to keep every pipeline stage busy.

    Tapped rows of the feature network are held for as many. Communication: none.
    """
    batches = rows.split(settings.micro_batch_size)
    together = BATCHES_PER_STAGE * pipeline_size
    return [batches[first : first + together] for first in range(0, len(batches), together)]


@torch.no_grad()
def evaluate_chunk(
    policy: PipelinedModel,
    feature_network: FeatureNetwork | None,
    batches: Sequence[TokenBatch],
    settings: EvaluationSettings,
) -> Evaluation:
    """Evaluate a few micro-batches; see `evaluate`.

    Communication: that of scoring, generation and `FeatureNetwork.grams`.
    """
    plan = settings.plan
    requests = [
        ScoreRequest(batch.tokens, None, targets=True, temperature=1.0, documents=batch.documents) for batch in batches
    ]
    per_row: dict[str, list[float | None]] = {}

    def note(batch: TokenBatch, figures: dict[str, Tensor]) -> None:
        """Add metrics [B], without those of filler rows; what is not finite is none."""
        real = batch.row_indices >= 0
        for name, values in figures.items():
            found = values[real].tolist()
            per_row.setdefault(name, []).extend(value if math.isfinite(value) else None for value in found)

    for batch, logprobs in zip(batches, score_without_gradient(policy, requests, plan), strict=True):
        assert logprobs.target is not None, "targets were asked for"
        note(batch, {CROSS_ENTROPY: -logprobs.target.double().mean(dim=1)})
    if feature_network is None:
        return Evaluation(per_row, ())
    sampled = generate_rollouts(policy, batches, plan, settings.sampling, EVALUATION_STEP)
    rollouts = [item.rollout for item in sampled]
    grams = feature_network.grams(batches, rollouts, plan)
    blocks_left_out = 0
    for batch, gram, rollout in zip(batches, grams, rollouts, strict=True):
        counted, finite = counted_blocks(batch, plan), finite_blocks(gram)
        blocks_left_out += int((counted & ~finite).sum())
        note(batch, _rollout_figures(gram, rollout, settings, None if batch.documents is None else counted))
    return Evaluation(per_row, _shown_blocks(batches[0], rollouts[0], grams[0], plan), blocks_left_out)


def merge(parts: Sequence[Evaluation]) -> Evaluation:
    """Put the ranks' evaluations together in row order."""
    names = {name: None for part in parts for name in part.per_row}
    per_row = {name: [value for part in parts for value in part.per_row.get(name, [])] for name in names}
    shown = tuple(block for part in parts for block in part.shown)[:SHOWN_BLOCKS]
    return Evaluation(per_row, shown, sum(part.blocks_left_out for part in parts))


def gather(evaluation: Evaluation, group: dist.ProcessGroup) -> Evaluation:
    """Merge the evaluations of all ranks of a group, on every rank.

    Communication: one all-gather of a few numbers per row.
    """
    return merge(all_gather_values(evaluation, group, (Evaluation,)))


def _rollout_figures(
    gram: Tensor, rollout: Rollout, settings: EvaluationSettings, counted: Tensor | None
) -> dict[str, Tensor]:
    """Per-row metrics [B] of rollouts over the finite blocks, of those that count, bool [B, K], if given.

    NaN for a row without any.
    """
    figures = block_figures(gram, rollout.tokens, settings.whitening, settings.plan)
    finite = finite_blocks(gram)
    return {name: row_means(values, finite, counted) for name, values in figures.items()}


def _shown_blocks(batch: TokenBatch, rollout: Rollout, gram: Tensor, plan: BlockPlan) -> tuple[ShownBlock, ...]:
    """A few of the finite and counted blocks of a batch's first row; a filler row has none."""
    counted = (counted_blocks(batch, plan) & finite_blocks(gram))[0].nonzero()[:, 0].tolist()
    alignment = block_alignment(gram[:1], plan)[0]
    blocks = counted[:: max(1, len(counted) // SHOWN_BLOCKS)]
    starts = [0] * plan.sequence_length if batch.documents is None else batch.documents.token_starts[0].tolist()
    return tuple(
        ShownBlock(
            row=int(batch.row_indices[0]),
            block=block,
            context=batch.tokens[0, starts[plan.anchors[block] - 1] : plan.anchors[block]].tolist(),
            target=batch.tokens[0, plan.anchors[block] : plan.anchors[block] + plan.generate_length].tolist(),
            rollouts=rollout.tokens[0, :, block].tolist(),
            alignment=alignment[:, block].tolist(),
        )
        for block in blocks[:SHOWN_BLOCKS]
    )
