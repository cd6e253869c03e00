"""Log-probabilities of sampled tokens and of the text under the policy, with or without gradient."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ebft_mega.block_plan import BlockPlan
from ebft_mega.model.head import RowScores, ScoredTokens
from ebft_mega.model.stage import PipelinedModel, Stage
from ebft_mega.model.strided_attention import StridedLayout
from ebft_mega.parallel.pipeline import Slot, run_ring, share_from_last_stage
from ebft_mega.rollout.forward import SavedForward, join_scores
from ebft_mega.rollout.packed_order import anchor_positions, from_sequence, packed_sequence, to_sequence
from ebft_mega.types import PolicyLogprobs, RowDocuments


@dataclass(frozen=True)
class ScoreRequest:
    """The tokens that one forward pass of the policy scores."""

    tokens: Tensor  # int64 [B, P]
    rollouts: Tensor | None  # int64 [B, n, K, G]; None: no rollout log-probabilities
    targets: bool  # whether the log-probabilities of the row's own tokens are wanted
    temperature: float  # of the rollouts' log-probabilities
    documents: RowDocuments | None = None  # with document masking

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
        """D, document positions of the pass: only rows whose output is read are computed."""
        return self.tokens.shape[1] - 1 if self.targets else plan.anchors[-1]

    def num_positions(self, plan: BlockPlan) -> int:
        """S, all positions of the pass; the last token of a rollout predicts nothing."""
        generated = 0 if self.rollouts is None else plan.rollouts_per_row * (plan.generate_length - 1)
        return self.document_length(plan) + generated

    def fed_back(self, plan: BlockPlan) -> Tensor:
        """Rollout tokens that predict another: int64 [B, n, K, G - 1], or without rollouts none."""
        if self.rollouts is None:
            return self.tokens.new_empty((len(self.tokens), plan.num_samples, plan.num_blocks, 0))
        return self.rollouts[..., :-1]


def score(
    stage: Stage,
    request: ScoreRequest,
    plan: BlockPlan,
    received: Tensor | None = None,
    saved: SavedForward | None = None,
) -> tuple[Tensor, ...]:
    """Score sampled tokens at the sampling temperature and the row's own tokens at temperature 1.

    Rows whose output is not read are not computed: the last token of each rollout predicts nothing, the document ends
    at the last anchor unless targets are wanted, and the head sees only rows that are scored, a chunk at a time.

    Args:
        received: hidden states of the stage before; None on the first, and with `saved`.
        saved: the forward pass that the rollout was; None computes it.
    Returns:
        On the last stage: rollout log-probabilities float32 [B, n, K, G] if `request.rollouts`, then target
        log-probabilities float32 [B, P - 1] of `tokens[:, 1:]` if `request.targets`. Before: the hidden states
        alone. A tuple of tensors, as an engine's forward needs it.
    Communication: that of the layers (of `SavedForward.hidden_states`) and of `VocabularyHead.forward`.
    Source: EBFT paper (arXiv 2603.12248), strided mode; label pairing of the authors' `prepare_logprobs`.
    """
    document, fed_back = request.tokens[:, : request.document_length(plan)], request.fed_back(plan)
    if saved is None:
        hidden = _hidden_states(stage, document, fed_back, plan, received, request.documents)
        pass_lengths, known = [request.num_positions(plan)], None
    else:
        hidden = saved.hidden_states(stage, document, to_sequence(fed_back), plan, request.documents)
        pass_lengths, known = saved.pass_lengths, join_scores(saved.scores)
    if not stage.shape.has_head:
        return (hidden,)
    hidden = stage.whole_sequence(hidden, sum(pass_lengths), stage.hidden.order(pass_lengths))  # [S, B, H]
    return _scored(stage, hidden, request, plan, known)


def _hidden_states(
    stage: Stage,
    document: Tensor,
    fed_back: Tensor,
    plan: BlockPlan,
    received: Tensor | None,
    documents: RowDocuments | None,
) -> Tensor:
    """One packed pass through the stage."""
    sequence, positions = packed_sequence(document, fed_back, plan, documents)
    layout = StridedLayout.of(
        plan,
        stage.attention,
        document_length=document.shape[1],
        tokens_per_rollout=fed_back.shape[3],
        documents=documents,
    )
    return stage.hidden_states(sequence if received is None else received, positions, layout)


def _scored(
    stage: Stage, hidden: Tensor, request: ScoreRequest, plan: BlockPlan, known: RowScores | None
) -> tuple[Tensor, ...]:
    """Pick the rows that predict something and score what they predict.

    Args:
        hidden: [S, B, H] before the final norm; known: scores of the rollouts' rows.
    """
    tokens, rollouts, device = request.tokens, request.rollouts, hidden.device
    num_rows, document = len(tokens), request.document_length(plan)
    positions, choices, temperatures = [], [], []
    if rollouts is not None:
        # All samples of a block draw their first token from the row before the anchor: n choices. A later row has one,
        # repeated to the same number.
        positions += [anchor_positions(plan, device) - 1, torch.arange(document, len(hidden), device=device)]
        later = to_sequence(rollouts[..., 1:]).T[..., None]  # [T * R, B, 1]
        choices += [rollouts[..., 0].permute(2, 0, 1), later.expand(-1, -1, plan.num_samples)]
        temperatures += [request.temperature] * 2
    if request.targets:
        positions.append(torch.arange(document, device=device))
        width = 1 if rollouts is None else plan.num_samples
        choices.append(tokens[:, 1:].T[..., None].expand(-1, -1, width))
        temperatures.append(1.0)
    sizes = [len(part) for part in positions]
    temperature = torch.cat(
        [
            torch.full((size * num_rows,), value, dtype=torch.float64, device=device)
            for size, value in zip(sizes, temperatures, strict=True)
        ]
    )
    scored = ScoredTokens(torch.cat(choices).flatten(0, 1), temperature, known)
    logprobs = stage.logprobs(hidden[torch.cat(positions)].flatten(0, 1), scored)
    parts = list(logprobs.unflatten(0, (-1, num_rows)).split(sizes))  # [positions, B, choices] each
    scores = []
    if rollouts is not None:
        first, later = parts.pop(0), parts.pop(0)
        first = first.permute(1, 2, 0)[..., None]  # [B, n, K, 1]
        scores.append(torch.cat((first, from_sequence(later[..., 0].T, plan)), dim=-1))
    if request.targets:
        scores.append(parts.pop(0)[..., 0].T)
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
        found = model.run(lambda stage: score(stage, request, plan, received))
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
