"""Log-probabilities of sampled tokens and of the text under the policy, with or without gradient."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ebft_mega.block_plan import BlockPlan
from ebft_mega.forest import Forest
from ebft_mega.model.head import LinearValues, RowScores, ScoredTokens
from ebft_mega.model.stage import PipelinedModel, Stage
from ebft_mega.model.strided_attention import StridedLayout
from ebft_mega.parallel.pipeline import Slot, run_ring, share_from_last_stage
from ebft_mega.rollout.forward import SavedForward, join_scores, logprobs_of_rollouts
from ebft_mega.rollout.packed_order import anchor_rows, packed_sequence, stem_rows
from ebft_mega.types import PolicyLogprobs, RowDocuments


@dataclass(frozen=True)
class ScoreRequest:
    """The tokens that one forward pass of the policy scores."""

    tokens: Tensor  # int64 [B, P]
    forest: Forest | None  # the rollouts, whole; None: no rollout log-probabilities
    targets: bool  # whether the log-probabilities of the row's own tokens are wanted
    temperature: float  # of the rollouts' log-probabilities
    documents: RowDocuments | None = None  # with document masking
    # Values of the rollouts' next tokens whose expectations are to be added up: a direction for each row that tokens
    # are drawn from, as in `Sampled.means`, those of the rollouts that share it added up; None: none.
    values: LinearValues | None = None
    entropies: bool = False  # whether the entropies of the distributions that predict the row's own tokens are wanted

    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the log-probabilities, rollouts before targets, of entropies, and of the sum of expectations."""
        rows, length = self.tokens.shape
        shapes: list[tuple[int, ...]] = []
        if self.forest is not None:
            shapes.append((rows, self.forest.num_samples, self.forest.num_blocks, len(self.forest.levels)))
        if self.targets:
            shapes += [(rows, length - 1)] * (1 + self.entropies)
        return shapes if self.values is None else [*shapes, ()]

    def logprobs(self, values: Sequence[Tensor]) -> PolicyLogprobs:
        """What has those shapes by its names."""
        remaining = list(values)
        return PolicyLogprobs(
            rollout=remaining.pop(0) if self.forest is not None else None,
            target=remaining.pop(0) if self.targets else None,
            entropies=remaining.pop(0) if self.targets and self.entropies else None,
            expected_values=remaining.pop(0) if self.values is not None else None,
        )

    def document_length(self, plan: BlockPlan) -> int:
        """D, document positions of each row in the pass: only rows whose output is read are computed."""
        return plan.document_length(self.targets)

    @property
    def fed_back(self) -> Forest | None:
        """The tokens that predict another: all but the last ones."""
        return None if self.forest is None else self.forest.up_to(len(self.forest.levels) - 1)

    def num_positions(self, plan: BlockPlan) -> int:
        """S, all positions of the pass."""
        fed_back = self.fed_back
        return len(self.tokens) * self.document_length(plan) + (0 if fed_back is None else fed_back.num_nodes)


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
        On the last stage: rollout log-probabilities float32 [B, n, K, G] if `request.forest`, then target
        log-probabilities float32 [B, P - 1] of `tokens[:, 1:]` if `request.targets`, then as many entropies in nats if
        `request.entropies`, too, then the sum of all expectations float32 [] if `request.values`. Before: the hidden
        states alone. A tuple of tensors, as an engine's forward needs it.
    Communication: that of the layers (of `SavedForward.hidden_states`) and of `VocabularyHead.forward`.
    Source: EBFT paper (arXiv 2603.12248), strided mode; label pairing of the authors' `prepare_logprobs`.
    """
    document = request.tokens[:, : request.document_length(plan)]
    if saved is None:
        hidden = hidden_states_of(stage, document, request, plan, received)
        pass_lengths, known = [request.num_positions(plan)], None
    else:
        assert request.fed_back is not None, "what was saved is a rollout"
        hidden = saved.hidden_states(stage, document, request.fed_back, plan, request.documents)
        pass_lengths, known = saved.pass_lengths, join_scores(saved.scores)
    if not stage.shape.has_head:
        return (hidden,)
    hidden = stage.whole_sequence(hidden, sum(pass_lengths), stage.hidden.order(pass_lengths))  # [S, 1, H]
    return _scored(stage, hidden[:, 0], request, plan, known)


def hidden_states_of(
    stage: Stage, document: Tensor, request: ScoreRequest, plan: BlockPlan, received: Tensor | None
) -> Tensor:
    """One packed pass through the stage.

    Args:
        document: int64 [B, D], the document positions of the pass; received: hidden states of the stage before.
    Returns:
        As `Stage.hidden_states`.
    Communication: that of the layers.
    """
    sequence, positions = packed_sequence(document, request.fed_back, plan, request.documents)
    layout = StridedLayout.of(
        plan,
        stage.attention,
        num_rows=len(document),
        document_length=document.shape[1],
        forest=request.fed_back,
        documents=request.documents,
    )
    return stage.hidden_states(sequence if received is None else received, positions, layout)


def _scored(
    stage: Stage, hidden: Tensor, request: ScoreRequest, plan: BlockPlan, known: RowScores | None
) -> tuple[Tensor, ...]:
    """Pick the rows that predict something and score what they predict.

    Args:
        hidden: [S, H] before the final norm; known: scores of the rollouts' rows.
    """
    tokens, forest, device = request.tokens, request.forest, hidden.device
    document = end = len(tokens) * request.document_length(plan)
    rows, choices, temperatures = [], [], []
    if forest is not None:
        rows += [anchor_rows(plan, len(tokens), request.document_length(plan), device)]
        choices += [forest.drawn[0]]
        for level, following in zip(forest.levels, forest.drawn[1:], strict=False):
            nodes = torch.arange(end, end + len(level), device=device)
            rows.append(level.joined(nodes, stem_rows(plan, level, request.document_length(plan))))
            choices.append(following[level.anchors])
            end += len(level)
        temperatures += [request.temperature] * len(choices)
    if request.targets:
        rows.append(torch.arange(document, device=device))
        width = 1 if forest is None else forest.num_samples
        choices.append(tokens[:, 1:].reshape(-1, 1).expand(-1, width))
        temperatures.append(1.0)
    sizes = [len(part) for part in choices]
    temperature = torch.cat(
        [
            torch.full((size,), value, dtype=torch.float64, device=device)
            for size, value in zip(sizes, temperatures, strict=True)
        ]
    )
    with_entropies = request.targets and request.entropies
    entropies_from = sum(sizes[:-1]) if with_entropies else None
    scored = ScoredTokens(torch.cat(choices), temperature, known, request.values, entropies_from)
    found = stage.logprobs(hidden[torch.cat(rows)], scored)
    expectations, entropies = [], []
    if with_entropies:
        entropies = [found[-sizes[-1] :, -1].unflatten(0, (len(tokens), -1))]
        found = found[:, :-1]
    if request.values is not None:
        expectations = [found[:, -1].sum()]
        found = found[:, :-1]
    parts = list(found.split(sizes))  # [rows, choices] each
    scores = []
    if forest is not None:
        scores.append(logprobs_of_rollouts(parts[: len(forest.levels)], forest))
    if request.targets:
        scores.append(parts[-1][:, 0].unflatten(0, (len(tokens), -1)))
    return (*scores, *entropies, *expectations)


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
        return model.hidden.empty(request.num_positions(plan))

    run_ring(model.groups, len(requests), run, hidden_buffer)
    shapes = [shape for request in requests for shape in request.shapes()]
    shared = iter(share_from_last_stage(scores, shapes, torch.float32, model.groups))
    return [request.logprobs([next(shared) for _ in request.shapes()]) for request in requests]
