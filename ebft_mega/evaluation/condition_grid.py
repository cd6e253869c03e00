"""Held-out figures of a policy under many conditions, each sampling and each packed pass made once.

A sampling at a temperature serves all completion lengths and feature maps, and a pass over the text gives the
cross-entropy and the calibration at all temperatures.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ebft_mega.block_plan import BlockPlan
from ebft_mega.evaluation.calibration import calibration_of, calibration_of_rows
from ebft_mega.evaluation.conditions import Condition
from ebft_mega.evaluation.held_out import CROSS_ENTROPY, EVALUATION_STEP
from ebft_mega.evaluation.rollout_figures import block_figures, part_means, row_means
from ebft_mega.evaluation.text_pass import score_text
from ebft_mega.features.views import ViewedNetwork
from ebft_mega.model.stage import PipelinedModel
from ebft_mega.reward.marked_blocks import finite_blocks
from ebft_mega.reward.whitening import Whitening
from ebft_mega.rollout.generate import SamplingSettings, generate_rollouts
from ebft_mega.rollout.packed_order import counted_blocks
from ebft_mega.runtime.exchange import gather_values
from ebft_mega.types import Rollout, TokenBatch


@dataclass(frozen=True)
class NamedView:
    """What a view of a `ViewedNetwork` is called."""

    features: str
    completion_length: int


@dataclass(frozen=True)
class ViewedFeatures:
    """A frozen network, its views and their names, in the same order."""

    viewed: ViewedNetwork
    names: tuple[NamedView, ...]


@dataclass(frozen=True)
class GridSettings:
    """What every model is measured under."""

    plan: BlockPlan  # of the longest completions, maybe of shortened rows
    text: BlockPlan  # of whole rows
    sampling: SamplingSettings  # at any temperature
    temperatures: tuple[float, ...]
    calibration_temperatures: tuple[float, ...]
    whitening: Whitening  # of `eval/cfm_loss`


@dataclass(frozen=True)
class Figures:
    """Figures of rows, in row order."""

    per_row: dict[str, list[Any]]  # numbers, None where a row has none, or lists of numbers
    per_position: dict[str, list[Any]]  # lists of POSITION_BINS numbers or None
    left_out: int = 0  # blocks that would count, of which something was not finite


@dataclass(frozen=True)
class GridFigures:
    """All figures of some rows."""

    text: Figures
    calibration: list[Figures]  # by `GridSettings.calibration_temperatures`
    conditions: dict[Condition, Figures]


@torch.no_grad()
def evaluate_grid(
    policy: PipelinedModel,
    features: Sequence[ViewedFeatures],
    batches: Sequence[TokenBatch],
    settings: GridSettings,
) -> GridFigures:
    """Evaluate a few micro-batches of this replica; filler rows are left out.

    Args:
        features: frozen networks; views of `settings.plan.generate_length` tokens and fewer.
    Returns:
        The same on every rank of the replica.
    Communication: that of `score_text`; for each temperature that of `generate_rollouts` and of `ViewedNetwork.grams`.
    """
    scores = score_text(policy, batches, settings.text, settings.calibration_temperatures)
    text = _merged([_text_figures(batch, found[..., 0]) for batch, found in zip(batches, scores, strict=True)])
    calibration = [
        _merged([_calibration(batch, found[..., 1:], index) for batch, found in zip(batches, scores, strict=True)])
        for index in range(len(settings.calibration_temperatures))
    ]
    conditions: dict[Condition, Figures] = {}
    cut = [_cut(batch, settings.plan.sequence_length) for batch in batches]
    for temperature in settings.temperatures:
        sampling = replace(settings.sampling, temperature=temperature)
        sampled = generate_rollouts(policy, cut, settings.plan, sampling, EVALUATION_STEP)
        rollouts = [item.rollout for item in sampled]
        for each in features:
            grams = each.viewed.grams(cut, rollouts, settings.plan)
            for name, of_view in zip(each.names, grams, strict=True):
                condition = Condition(temperature, name.completion_length, name.features)
                conditions[condition] = _view_figures(cut, rollouts, of_view, name.completion_length, settings)
    return GridFigures(text, calibration, conditions)


def merge_grid(parts: Sequence[GridFigures]) -> GridFigures:
    """Put figures of rows behind one another."""
    first = parts[0]
    return GridFigures(
        _merged([part.text for part in parts]),
        [_merged([part.calibration[index] for part in parts]) for index in range(len(first.calibration))],
        {condition: _merged([part.conditions[condition] for part in parts]) for condition in first.conditions},
    )


def gather_grid(own: GridFigures, group: dist.ProcessGroup) -> GridFigures | None:
    """Put the figures of all replicas together in row order, on a group's first rank; None on the others.

    Communication: one gathering of the figures of every row.
    """
    if dist.get_world_size(group) == 1:
        return own
    parts = gather_values(own, group, (GridFigures, Figures, Condition))
    return None if parts is None else merge_grid(parts)


def plan_of_length(plan: BlockPlan, length: int) -> BlockPlan:
    """The plan of shorter completions from the same anchors: rows end sooner by what they lack."""
    lacking = plan.generate_length - length
    return replace(plan, sequence_length=plan.sequence_length - lacking, generate_length=length)


def _cut(batch: TokenBatch, length: int) -> TokenBatch:
    """The first tokens of every row."""
    documents = batch.documents
    if documents is not None:
        starts = tuple(tuple(start for start in row if start < length) for row in documents.starts)
        documents = replace(documents, starts=starts, token_starts=documents.token_starts[:, :length])
    return replace(
        batch, tokens=batch.tokens[:, :length], document_ids=batch.document_ids[:, :length], documents=documents
    )


def _text_figures(batch: TokenBatch, logprobs: Tensor) -> Figures:
    """Cross-entropy of targets [B, P - 1]."""
    losses = -logprobs.double()
    rows = {CROSS_ENTROPY: _of_rows(batch, losses.mean(dim=1))}
    return Figures(
        rows, {CROSS_ENTROPY: _of_rows(batch, part_means(losses, torch.ones_like(losses, dtype=torch.bool)))}
    )


def _calibration(batch: TokenBatch, found: Tensor, index: int) -> Figures:
    sums = calibration_of_rows(calibration_of(found, index))
    return Figures({name: _of_rows(batch, values) for name, values in sums.items()}, {})


def _view_figures(
    batches: Sequence[TokenBatch],
    rollouts: Sequence[Rollout],
    grams: Sequence[Tensor],
    length: int,
    settings: GridSettings,
) -> Figures:
    """Figures of one condition."""
    plan, parts = plan_of_length(settings.plan, length), []
    for batch, rollout, gram in zip(batches, rollouts, grams, strict=True):
        blocks = block_figures(gram, rollout.tokens[..., :length], settings.whitening, plan)
        counted, finite = counted_blocks(batch, plan), finite_blocks(gram)
        masked = None if batch.documents is None else counted
        rows = {name: _of_rows(batch, row_means(values, finite, masked)) for name, values in blocks.items()}
        places = {name: _of_rows(batch, part_means(values, finite & counted)) for name, values in blocks.items()}
        parts.append(Figures(rows, places, int((counted & ~finite).sum())))
    return _merged(parts)


def _of_rows(batch: TokenBatch, values: Tensor) -> list[Any]:
    """Values [B] or [B, X] without those of filler rows, as numbers; None for what is not finite."""
    found: list[Any] = values[batch.row_indices >= 0].tolist()
    return [_finite(value) if isinstance(value, float) else [_finite(each) for each in value] for value in found]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _merged(parts: Sequence[Figures]) -> Figures:
    def joined(tables: Sequence[dict[str, list[Any]]]) -> dict[str, list[Any]]:
        return {name: [value for table in tables for value in table[name]] for name in tables[0]}

    return Figures(
        joined([part.per_row for part in parts]),
        joined([part.per_position for part in parts]),
        sum(part.left_out for part in parts),
    )
