"""How a policy does on held-out text: cross-entropy, and how near its rollouts come to the text in feature space.

All figures are taken at the training temperature, on fixed rows, with noise that depends only on the seed and the
row, so that two models are compared under the same draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ebft_mega.config.schema import RunConfig
from ebft_mega.features.network import FeatureNetwork
from ebft_mega.model.stage import Stage
from ebft_mega.reward.closed_forms import (
    Whitening,
    block_rewards,
    raw_cosine,
    unbiased_feature_matching,
)
from ebft_mega.reward.duplicates import duplicate_share_per_row
from ebft_mega.rollout.generate import SamplingSettings, generate_rollouts
from ebft_mega.rollout.plan import BlockPlan
from ebft_mega.rollout.score import ScoreRequest, score
from ebft_mega.types import TokenBatch

# The sampling noise of evaluations is that of a step which no training has.
EVALUATION_STEP = -1
SHOWN_BLOCKS = 3


@dataclass(frozen=True)
class EvaluationSettings:
    """What an evaluation shares with the training it judges."""

    plan: BlockPlan
    sampling: SamplingSettings
    whitening: Whitening  # of `eval/cfm_loss`; the other figures have their own fixed definition
    micro_batch_size: int


def evaluation_settings(config: RunConfig) -> EvaluationSettings:
    """What a run's configuration says about its evaluations."""
    return EvaluationSettings(
        plan=config.block_plan,
        sampling=SamplingSettings.of(config),
        whitening=config.ebft.reward_whitening,
        micro_batch_size=config.train.micro_batch_size,
    )


@dataclass(frozen=True)
class ShownBlock:
    """A block for people to read: token ids of context, target and rollouts."""

    row: int
    block: int
    context: list[int]
    target: list[int]
    rollouts: list[list[int]]
    alignment: list[float]


@dataclass(frozen=True)
class Evaluation:
    """Held-out figures, per row in row order, under the `eval/*` names."""

    per_row: dict[str, list[float]]
    shown: tuple[ShownBlock, ...]

    @property
    def means(self) -> dict[str, float]:
        """Mean over rows of every figure."""
        return {name: sum(values) / len(values) for name, values in self.per_row.items()}


@torch.no_grad()
def evaluate(
    policy: Stage, feature_network: FeatureNetwork | None, rows: TokenBatch, settings: EvaluationSettings
) -> Evaluation:
    """Evaluate this rank's held-out rows.

    Args:
        policy: the whole model with whole parameters.
        feature_network: None evaluates the cross-entropy alone.
        rows: held-out rows, `row_indices` counting over all ranks.
    Communication: none beyond the layers'; `merge` puts the ranks together.
    """
    per_row: dict[str, list[float]] = {}
    shown: list[ShownBlock] = []
    for batch in rows.split(settings.micro_batch_size):
        request = ScoreRequest(batch.tokens, None, targets=True, temperature=1.0)
        (target_logprobs,) = score(policy, request, settings.plan)
        figures = {"eval/ce_loss": -target_logprobs.double().mean(dim=1)}
        if feature_network is not None:
            figures |= _rollout_figures(policy, feature_network, batch, settings, shown)
        for name, values in figures.items():
            per_row.setdefault(name, []).extend(values.tolist())
    return Evaluation(per_row, tuple(shown[:SHOWN_BLOCKS]))


def merge(parts: Sequence[Evaluation]) -> Evaluation:
    """Put the ranks' evaluations together in row order."""
    names = {name: None for part in parts for name in part.per_row}
    per_row = {name: [value for part in parts for value in part.per_row.get(name, [])] for name in names}
    return Evaluation(per_row, tuple(block for part in parts for block in part.shown)[:SHOWN_BLOCKS])


def gather(evaluation: Evaluation, group: dist.ProcessGroup) -> Evaluation:
    """The evaluation over all ranks of a group, on every rank.

    Communication: one all-gather of a few numbers per row.
    """
    parts: list[Evaluation | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, evaluation, group=group)
    return merge([part for part in parts if part is not None])


def _rollout_figures(
    policy: Stage,
    network: FeatureNetwork,
    batch: TokenBatch,
    settings: EvaluationSettings,
    shown: list[ShownBlock],
) -> dict[str, Tensor]:
    """Per-row figures [B] that need rollouts; appends blocks to show."""
    plan = settings.plan
    rollout = generate_rollouts(policy, batch, plan, settings.sampling, EVALUATION_STEP)
    gram = network.grams(batch, rollout, plan)
    whitened = block_rewards(gram, "sample", 1.0, 1.0)
    trained = block_rewards(gram, settings.whitening, 1.0, 1.0)
    figures = {
        "eval/alignment": whitened.alignment.mean(dim=(1, 2)),
        "eval/raw_cosine": raw_cosine(gram).mean(dim=(1, 2)),
        "eval/cfm_loss": trained.cfm.mean(dim=1),
        "eval/duplicate_share": duplicate_share_per_row(rollout.tokens),
    }
    if plan.num_samples > 1:
        figures["eval/feature_matching_loss"] = unbiased_feature_matching(gram).mean(dim=1)
    if not shown:
        for block in range(0, plan.num_blocks, max(1, plan.num_blocks // SHOWN_BLOCKS)):
            anchor = plan.anchors[block]
            shown.append(
                ShownBlock(
                    row=int(batch.row_indices[0]),
                    block=block,
                    context=batch.tokens[0, :anchor].tolist(),
                    target=batch.tokens[0, anchor : anchor + plan.generate_length].tolist(),
                    rollouts=rollout.tokens[0, :, block].tolist(),
                    alignment=whitened.alignment[0, :, block].tolist(),
                )
            )
    return figures
