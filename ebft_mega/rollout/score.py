"""Log-probabilities of rollouts and targets under the policy, in one packed forward with gradient."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ebft_mega.model.attention import StridedLayout
from ebft_mega.model.stage import PipelinedModel, Stage
from ebft_mega.objective.logprobs import selected_logprobs
from ebft_mega.parallel.pipeline import Slot, run_ring, share_from_last_stage
from ebft_mega.parallel.vocabulary import VocabularyShard
from ebft_mega.rollout.layout import from_sequence, packed_sequence
from ebft_mega.rollout.plan import BlockPlan
from ebft_mega.types import PolicyLogprobs


@dataclass(frozen=True)
class ScoreRequest:
    """What a policy forward is asked for."""

    tokens: Tensor  # int64 [B, P]
    rollouts: Tensor | None  # int64 [B, n, K, G]; None: no rollout log-probabilities
    targets: bool  # whether the log-probabilities of the row's own tokens are wanted
    temperature: float  # of the rollouts' log-probabilities

    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the log-probabilities, rollouts before targets."""
        rows, length = self.tokens.shape
        shapes: list[tuple[int, ...]] = [] if self.rollouts is None else [tuple(self.rollouts.shape)]
        return [*shapes, (rows, length - 1)] if self.targets else shapes

    def logprobs(self, values: Sequence[Tensor]) -> PolicyLogprobs:
        """Log-probabilities of those shapes by their names."""
        remaining = list(values)
        return PolicyLogprobs(
            rollout=remaining.pop(0) if self.rollouts is not None else None,
            target=remaining.pop(0) if self.targets else None,
        )

    def document_length(self, plan: BlockPlan) -> int:
        """Document positions of the pass: no row that nobody reads is computed."""
        return self.tokens.shape[1] - 1 if self.targets else plan.anchors[-1]

    def num_positions(self, plan: BlockPlan) -> int:
        """All positions of the pass; the last token of a rollout predicts nothing."""
        generated = 0 if self.rollouts is None else plan.rollouts_per_row * (plan.generate_length - 1)
        return self.document_length(plan) + generated


def score(
    stage: Stage, request: ScoreRequest, plan: BlockPlan, vocabulary: VocabularyShard, received: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Score sampled tokens at the sampling temperature and the row's own tokens at temperature 1.

    Rows nobody reads are not computed: the last token of each rollout predicts nothing, the document ends at the
    last anchor unless targets are wanted, and the head sees only rows that are scored.

    Args:
        received: hidden states of the stage before; None on the first.
    Returns:
        On the last stage: rollout log-probabilities float32 [B, n, K, G] if `request.rollouts`, then target
        log-probabilities float32 [B, P - 1] of `tokens[:, 1:]` if `request.targets`. Before: the hidden states
        alone. A tuple of tensors, as an engine's forward needs it.
    Communication: that of the layers and of `selected_logprobs`.
    Source: EBFT paper (arXiv 2603.12248), strided mode; label pairing of the authors' `prepare_logprobs`.
    """
    tokens, rollouts = request.tokens, request.rollouts
    num_rows, device = tokens.shape[0], tokens.device
    document = tokens[:, : request.document_length(plan)]
    inputs = (
        document.new_empty((num_rows, plan.num_samples, plan.num_blocks, 0)) if rollouts is None else rollouts[..., :-1]
    )
    sequence, positions = packed_sequence(document, inputs, plan)
    layout = StridedLayout.of(plan, device, document_length=document.shape[1], tokens_per_rollout=inputs.shape[3])
    hidden, _ = stage.hidden_states(sequence if received is None else received, positions, layout)
    if not stage.shape.has_head:
        return (hidden,)
    hidden = stage.whole_sequence(hidden, positions.numel())  # [S, B, H]

    anchors = torch.tensor(plan.anchors, device=device) - 1
    on_document, on_rollouts = hidden.split((document.shape[1], sequence.shape[1] - document.shape[1]))
    document_rows = on_document if request.targets else on_document[anchors]
    logits = stage.logits(torch.cat((document_rows, on_rollouts)).transpose(0, 1).flatten(0, 1))
    logits = logits.unflatten(0, (num_rows, -1))  # [B, document rows + R * (G - 1), V]
    document_logits, rollout_logits = logits.split((len(document_rows), len(on_rollouts)), dim=1)

    scores: list[Tensor] = []
    if rollouts is not None:
        # All samples of a block draw their first token from the same logits: [B, K, n] choices per anchor.
        anchor_logits = document_logits[:, anchors] if request.targets else document_logits
        first = selected_logprobs(anchor_logits, rollouts[..., 0].transpose(1, 2), request.temperature, vocabulary)
        later_tokens = rollouts[..., 1:].transpose(1, 2).flatten(1)[..., None]
        later = selected_logprobs(rollout_logits, later_tokens, request.temperature, vocabulary)[..., 0]
        scores.append(torch.cat((first.transpose(1, 2)[..., None], from_sequence(later, plan)), dim=-1))
    if request.targets:
        scores.append(selected_logprobs(document_logits, tokens[:, 1:, None], 1.0, vocabulary)[..., 0])
    return tuple(scores)


@torch.no_grad()
def score_without_gradient(
    model: PipelinedModel, requests: Sequence[ScoreRequest], plan: BlockPlan
) -> list[PolicyLogprobs]:
    """Score micro-batches for their values alone.

    Returns:
        Log-probabilities per request, the same on every rank of the replica.
    Communication: that of `score`; hidden states along the pipeline; one broadcast of all log-probabilities.
    """
    scores: list[Tensor] = []  # on the last stage

    def run(slot: Slot, received: Tensor | None) -> Tensor:
        request = requests[slot.micro_batch]
        found = model.run(lambda stage: score(stage, request, plan, model.vocabulary, received))
        if model.groups.is_last_stage:
            scores.extend(found)
        return found[0]

    def hidden_buffer(slot: Slot) -> Tensor:
        request = requests[slot.micro_batch]
        return model.hidden.empty(request.num_positions(plan), len(request.tokens))

    run_ring(model.groups, len(requests), run, hidden_buffer)
    shapes = [shape for request in requests for shape in request.shapes()]
    shared = iter(share_from_last_stage(scores, shapes, torch.float32, model.groups))
    return [request.logprobs([next(shared) for _ in request.shapes()]) for request in requests]
