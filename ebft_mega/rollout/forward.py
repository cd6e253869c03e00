"""The policy's forward pass, saved while a rollout is sampled and reused by the gradient pass."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ebft_mega.block_plan import BlockPlan
from ebft_mega.forest import Forest
from ebft_mega.model.head import RowScores
from ebft_mega.model.replay import replay
from ebft_mega.model.saved_activations import SavedInputs
from ebft_mega.model.stage import Stage
from ebft_mega.model.strided_attention import StridedLayout
from ebft_mega.rollout.packed_order import packed_sequence
from ebft_mega.types import RowDocuments


@dataclass
class SavedForward:
    """What one stage keeps of a micro-batch's rollout; used up by one gradient pass."""

    pass_lengths: list[int] = field(default_factory=list)  # positions of each pass: documents, then nodes by level
    scores: list[RowScores] = field(default_factory=list)  # last stage: of each token, the rows that it was drawn from
    inputs: SavedInputs | None = None  # checkpoints
    entering: list[Tensor] = field(default_factory=list)  # activations: leaves that received hidden states, by pass
    leaving: list[Tensor] = field(default_factory=list)  # activations: hidden states before the final norm, by pass
    placeholder: Tensor | None = None  # checkpoints: where the gradient arrives for the stage before

    def hidden_states(
        self,
        stage: Stage,
        document: Tensor,
        forest: Forest,
        plan: BlockPlan,
        documents: RowDocuments | None = None,
    ) -> Tensor:
        """Hidden states of the packed pass before the final norm, whose gradient flows into the stage.

        Args:
            document: int64 [B, D], the document positions of the pass.
            forest: the tokens that were fed back.
            documents: with document masking.
        Returns:
            [S / shards, 1, H], each pass's positions behind those of the pass before; where the stage has no head only
            its gradient has a meaning.
        Communication: for checkpoints that of the embedding now, and of the layers in the backward pass.
        """
        if self.inputs is None:
            return torch.cat(self.leaving)
        tokens, positions = packed_sequence(document, forest, plan, documents)
        layout = StridedLayout.of(
            plan,
            stage.attention,
            num_rows=len(document),
            document_length=document.shape[1],
            forest=forest,
            order=stage.hidden.order(self.pass_lengths),
            documents=documents,
        )
        if stage.shape.has_embedding:
            entering = torch.cat([stage.embed(part) for part in tokens.split(self.pass_lengths, dim=1)])
        else:
            entering = self.placeholder = self.inputs.placeholder().requires_grad_()
        return replay(stage, self.inputs, entering, positions, layout, self.pass_lengths)

    def entering_gradient(self) -> Tensor:
        """After the backward pass: gradient of the hidden states that entered the stage, [S / shards, 1, H]."""
        leaves = self.entering if self.placeholder is None else [self.placeholder]
        gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
        assert len(gradients) == len(leaves), "every pass passes a gradient on"
        return torch.cat(gradients)

    def release(self) -> None:
        """Free everything: the gradient has been taken."""
        self.pass_lengths, self.scores, self.entering, self.leaving = [], [], [], []
        self.inputs = self.placeholder = None


def join_scores(parts: Sequence[RowScores]) -> RowScores | None:
    """Scores of all tokens: of the anchor rows, then of the prefixes of each level that was fed back.

    Returns:
        RowScores with n choices a row, of which one counts that the row's own rollouts chose. None if there are none
        (on all but the last stage).
    """
    return RowScores.joined(parts) if parts else None


def logprobs_of_rollouts(scores: Sequence[Tensor], forest: Forest) -> Tensor:
    """Log-probabilities of rollouts' tokens by their places, from those of each token's rows.

    A row is scored for the next tokens of all rollouts of its anchor; those count that pass through it. So what all of
    them weigh adds up in the row's gradient.

    Args:
        scores: of each of the G tokens [rows, n]: of the B * K anchor rows, then of the prefixes of each level.
        forest: at least the levels that were fed back.
    Returns:
        float32 [B, n, K, G].
    Communication: none.
    """
    first, *later = scores
    sample = torch.arange(forest.num_samples, device=first.device)
    pairs = zip(later, forest.levels, strict=False)
    return forest.by_sample([first, *(logprobs[level.of_rollout, sample] for logprobs, level in pairs)])
