"""Held-out evaluation of a policy: cross-entropy, and how close its rollouts are to the text in feature space.

Rollouts are sampled at the training temperature, on fixed rows, with noise that depends only on the seed and the row,
so that two models are compared under the same draws. With document masking, metrics of rollouts are means over the
blocks that lie within one document. A row without such a block has no metrics of rollouts, whatever the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ebft_mega.block_plan import BlockPlan
from ebft_mega.config.schema import RunConfig
from ebft_mega.features.network import FeatureNetwork
from ebft_mega.model.stage import PipelinedModel
from ebft_mega.reward.alignment_and_diversity import (
    Whitening,
    block_rewards,
    raw_cosine,
    unbiased_feature_matching,
)
from ebft_mega.rollout.duplicates import has_duplicates
from ebft_mega.rollout.generate import SamplingSettings, generate_rollouts
from ebft_mega.rollout.packed_order import counted_blocks
from ebft_mega.rollout.score import ScoreRequest, score_without_gradient
from ebft_mega.runtime.exchange import all_gather_values
from ebft_mega.types import Rollout, TokenBatch

# Step number that the sampling noise of evaluations depends on; no training step has it.
EVALUATION_STEP = -1
# `eval/alignment` is always taken after sample whitening (the authors' definition), whatever `ebft.reward_whitening`
# says, so that models trained with different rewards are compared by the same metric.
ALIGNMENT_WHITENING: Whitening = "sample"
SHOWN_BLOCKS = 3
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

    @property
    def means(self) -> dict[str, float]:
        """Mean of every metric over the rows that have it; a metric that no row has is left out."""
        known = {name: [value for value in values if value is not None] for name, values in self.per_row.items()}
        return {name: sum(values) / len(values) for name, values in known.items() if values}


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

    def note(batch: TokenBatch, figures: dict[str, Tensor], has_figures: Tensor | None = None) -> None:
        """Add metrics [B], without those of filler rows; `has_figures` bool [B], None: all rows have them."""
        real = batch.row_indices >= 0
        known = [True] * len(real) if has_figures is None else has_figures[real].tolist()
        for name, values in figures.items():
            pairs = zip(values[real].tolist(), known, strict=False)
            per_row.setdefault(name, []).extend(value if is_known else None for value, is_known in pairs)

    for batch, logprobs in zip(batches, score_without_gradient(policy, requests, plan), strict=True):
        assert logprobs.target is not None, "targets were asked for"
        note(batch, {"eval/ce_loss": -logprobs.target.double().mean(dim=1)})
    if feature_network is None:
        return Evaluation(per_row, ())
    sampled = generate_rollouts(policy, batches, plan, settings.sampling, EVALUATION_STEP)
    rollouts = [item.rollout for item in sampled]
    grams = feature_network.grams(batches, rollouts, plan)
    for batch, gram, rollout in zip(batches, grams, rollouts, strict=True):
        counted = None if batch.documents is None else counted_blocks(batch, plan)
        figures = _rollout_figures(gram, rollout, settings, counted)
        note(batch, figures, None if counted is None else counted.any(dim=1))
    return Evaluation(per_row, _shown_blocks(batches[0], rollouts[0], grams[0], plan))


def merge(parts: Sequence[Evaluation]) -> Evaluation:
    """Put the ranks' evaluations together in row order."""
    names = {name: None for part in parts for name in part.per_row}
    per_row = {name: [value for part in parts for value in part.per_row.get(name, [])] for name in names}
    return Evaluation(per_row, tuple(block for part in parts for block in part.shown)[:SHOWN_BLOCKS])


def gather(evaluation: Evaluation, group: dist.ProcessGroup) -> Evaluation:
    """Merge the evaluations of all ranks of a group, on every rank.

    Communication: one all-gather of a few numbers per row.
    """
    return merge(all_gather_values(evaluation, group, (Evaluation,)))


def _rollout_figures(
    gram: Tensor, rollout: Rollout, settings: EvaluationSettings, counted: Tensor | None
) -> dict[str, Tensor]:
    """Per-row metrics [B] of rollouts; over counted blocks bool [B, K] if given, NaN for a row without any."""
    figures = {
        "eval/alignment": block_rewards(gram, ALIGNMENT_WHITENING, 1.0, 1.0).alignment,
        "eval/raw_cosine": raw_cosine(gram),
        "eval/cfm_loss": block_rewards(gram, settings.whitening, 1.0, 1.0).cfm,
        "eval/duplicate_share": has_duplicates(rollout.tokens).to(torch.float64),
    }
    if settings.plan.num_samples > 1:
        figures["eval/feature_matching_loss"] = unbiased_feature_matching(gram)
    return {name: _row_means(values, counted) for name, values in figures.items()}


def _row_means(values: Tensor, counted: Tensor | None) -> Tensor:
    """Means [B] of values [B, K] or [B, n, K] over all blocks or over counted ones, bool [B, K]."""
    if counted is None:
        return values.mean(dim=tuple(range(1, values.dim())))
    by_block = values if values.dim() == 2 else values.mean(dim=1)
    return by_block.masked_fill(~counted, 0.0).sum(dim=1) / counted.sum(dim=1)


def _shown_blocks(batch: TokenBatch, rollout: Rollout, gram: Tensor, plan: BlockPlan) -> tuple[ShownBlock, ...]:
    """A few of the counted blocks of a batch's first row; a filler row has none."""
    counted = counted_blocks(batch, plan)[0].nonzero()[:, 0].tolist()
    alignment = block_rewards(gram[:1], ALIGNMENT_WHITENING, 1.0, 1.0).alignment[0]
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
