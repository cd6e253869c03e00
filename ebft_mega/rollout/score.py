"""Log-probabilities of rollouts and targets under the policy, in one packed forward with gradient."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ebft_mega.model.attention import StridedLayout
from ebft_mega.model.stage import Stage
from ebft_mega.objective.logprobs import selected_logprobs
from ebft_mega.rollout.layout import from_sequence, packed_sequence
from ebft_mega.rollout.plan import BlockPlan


@dataclass(frozen=True)
class ScoreRequest:
    """What a policy forward is asked for."""

    tokens: Tensor  # int64 [B, P]
    rollouts: Tensor | None  # int64 [B, n, K, G]; None: no rollout log-probabilities
    targets: bool  # whether the log-probabilities of the row's own tokens are wanted
    temperature: float  # of the rollouts' log-probabilities


def score(policy: Stage, request: ScoreRequest, plan: BlockPlan) -> tuple[Tensor, ...]:
    """Score sampled tokens at the sampling temperature and the row's own tokens at temperature 1.

    Rows nobody reads are not computed: the last token of each rollout predicts nothing, the document ends at the
    last anchor unless targets are wanted, and the head sees only rows that are scored.

    Returns:
        rollout log-probabilities float32 [B, n, K, G] if `request.rollouts`, then target log-probabilities float32
        [B, P - 1] of `tokens[:, 1:]` if `request.targets`. A tuple of tensors, as an engine's forward needs it.
    Communication: that of the policy's layers.
    Source: EBFT paper (arXiv 2603.12248), strided mode; label pairing of the authors' `prepare_logprobs`.
    """
    tokens, rollouts = request.tokens, request.rollouts
    num_rows, device = tokens.shape[0], tokens.device
    document = tokens[:, :-1] if request.targets else tokens[:, : plan.anchors[-1]]
    inputs = (
        document.new_empty((num_rows, plan.num_samples, plan.num_blocks, 0)) if rollouts is None else rollouts[..., :-1]
    )
    sequence, positions = packed_sequence(document, inputs, plan)
    layout = StridedLayout.of(plan, device, document_length=document.shape[1], tokens_per_rollout=inputs.shape[3])
    hidden, _ = policy.hidden_states(sequence, positions, layout)  # [S, B, H]

    anchors = torch.tensor(plan.anchors, device=device) - 1
    on_document, on_rollouts = hidden.split((document.shape[1], sequence.shape[1] - document.shape[1]))
    document_rows = on_document if request.targets else on_document[anchors]
    logits = policy.logits(torch.cat((document_rows, on_rollouts)).transpose(0, 1).flatten(0, 1))
    logits = logits.unflatten(0, (num_rows, -1))  # [B, document rows + R * (G - 1), V]
    document_logits, rollout_logits = logits.split((len(document_rows), len(on_rollouts)), dim=1)

    scores: list[Tensor] = []
    if rollouts is not None:
        # All samples of a block draw their first token from the same logits: [B, K, n] choices per anchor.
        anchor_logits = document_logits[:, anchors] if request.targets else document_logits
        first = selected_logprobs(anchor_logits, rollouts[..., 0].transpose(1, 2), request.temperature)
        later_tokens = rollouts[..., 1:].transpose(1, 2).flatten(1)[..., None]
        later = selected_logprobs(rollout_logits, later_tokens, request.temperature)[..., 0]
        scores.append(torch.cat((first.transpose(1, 2)[..., None], from_sequence(later, plan)), dim=-1))
    if request.targets:
        scores.append(selected_logprobs(document_logits, tokens[:, 1:, None], 1.0)[..., 0])
    return tuple(scores)
