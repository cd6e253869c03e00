"""One pass of the policy over the text: cross-entropy, and calibration at several temperatures from the same logits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ebft_mega.architecture.vocabulary_blocks import HEAD_ROWS
from ebft_mega.block_plan import BlockPlan
from ebft_mega.evaluation.calibration import token_calibration
from ebft_mega.model.head import score_rows
from ebft_mega.model.stage import PipelinedModel, Stage
from ebft_mega.parallel.pipeline import Slot, run_ring, share_from_last_stage
from ebft_mega.rollout.score import ScoreRequest, hidden_states_of
from ebft_mega.types import TokenBatch


@torch.no_grad()
def score_text(
    policy: PipelinedModel, batches: Sequence[TokenBatch], plan: BlockPlan, temperatures: Sequence[float]
) -> list[Tensor]:
    """Score the text's own tokens, teacher-forced.

    Args:
        plan: of whole rows; temperatures: of the distributions whose calibration is asked for, > 0.
    Returns:
        Per micro-batch float32 [B, P - 1, 2 + 2 * temperatures] of `tokens[:, 1:]`, the same on every rank of the
        replica: the log-probability at temperature 1, then what `token_calibration` finds.
    Communication: that of the layers, of `score_rows` and of `token_calibration`; hidden states along the pipeline, and
        one broadcast of what is returned.
    Memory: logits of `HEAD_ROWS` rows.
    """
    requests = [ScoreRequest(batch.tokens, None, True, 1.0, batch.documents) for batch in batches]
    scores: list[Tensor] = []  # on the last stage

    def run(slot: Slot, received: Tensor | None) -> Tensor:
        request = requests[slot.micro_batch]
        output: Tensor = policy.run(lambda stage: _scored(policy, stage, request, plan, temperatures, received))
        if policy.groups.is_last_stage:
            scores.append(output)
        return output

    def hidden_buffer(slot: Slot) -> Tensor:
        return policy.hidden.empty(requests[slot.micro_batch].num_positions(plan))

    run_ring(policy.groups, len(requests), run, hidden_buffer)
    width = 2 + 2 * len(temperatures)
    shapes = [(len(request.tokens), request.tokens.shape[1] - 1, width) for request in requests]
    return share_from_last_stage(scores, shapes, torch.float32, policy.groups)


def _scored(
    policy: PipelinedModel,
    stage: Stage,
    request: ScoreRequest,
    plan: BlockPlan,
    temperatures: Sequence[float],
    received: Tensor | None,
) -> Tensor:
    """On the last stage the scores of a micro-batch, before it hidden states."""
    document = request.tokens[:, : request.document_length(plan)]
    hidden = hidden_states_of(stage, document, request, plan, received)
    if not stage.shape.has_head:
        return hidden
    rows = stage.whole_sequence(hidden, document.numel())[:, 0]
    targets, found = request.tokens[:, 1:].reshape(-1), []
    for own, of_own in zip(rows.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
        logits = stage.logits(own)
        one = torch.ones(len(own), dtype=torch.float64, device=own.device)
        scores = score_rows(logits, of_own[:, None], one, policy.vocabulary)
        calibration = token_calibration(logits, of_own, temperatures, policy.vocabulary)
        found.append(torch.cat((scores.logprobs, calibration), dim=-1))
    return torch.cat(found).unflatten(0, (len(document), -1))
