"""The policy's forward pass, saved while a rollout is sampled and reused by the gradient pass."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ebft_mega.block_plan import BlockPlan
from ebft_mega.model.head import RowScores
from ebft_mega.model.replay import replay
from ebft_mega.model.saved_activations import SavedInputs
from ebft_mega.model.stage import Stage
from ebft_mega.model.strided_attention import StridedLayout
from ebft_mega.rollout.packed_order import packed_positions
from ebft_mega.types import RowDocuments


@dataclass
class SavedForward:
    """What one stage keeps of a micro-batch's rollout; used up by one gradient pass."""

    pass_lengths: list[int] = field(default_factory=list)  # positions of each pass: the document, then R for each token
    scores: list[RowScores] = field(default_factory=list)  # last stage: of each token, rows by position, then B
    inputs: SavedInputs | None = None  # checkpoints
    entering: list[Tensor] = field(default_factory=list)  # activations: leaves that received hidden states, by pass
    leaving: list[Tensor] = field(default_factory=list)  # activations: hidden states before the final norm, by pass
    placeholder: Tensor | None = None  # checkpoints: where the gradient arrives for the stage before

    def hidden_states(
        self,
        stage: Stage,
        document: Tensor,
        rollouts: Tensor,
        plan: BlockPlan,
        documents: RowDocuments | None = None,
    ) -> Tensor:
        """Hidden states of the packed pass before the final norm, whose gradient flows into the stage.

        Args:
            document: int64 [B, D], the document positions of the pass.
            rollouts: int64 [B, R * T], what was fed back, token-major.
            documents: with document masking.
        Returns:
            [S / shards, B, H], each pass's positions behind those of the pass before; where the stage has no head only
            its gradient has a meaning.
        Communication: for checkpoints that of the embedding now, and of the layers in the backward pass.
        """
        if self.inputs is None:
            return torch.cat(self.leaving)
        device, shape = document.device, stage.hidden
        positions = packed_positions(plan, self.pass_lengths[0], len(self.pass_lengths) - 1, device, documents)
        layout = StridedLayout.of(
            plan,
            stage.attention,
            document_length=self.pass_lengths[0],
            tokens_per_rollout=len(self.pass_lengths) - 1,
            order=shape.order(self.pass_lengths),
            documents=documents,
        )
        if stage.shape.has_embedding:
            tokens = torch.cat((document, rollouts), dim=1)
            entering = torch.cat([stage.embed(part) for part in tokens.split(self.pass_lengths, dim=1)])
        else:
            entering = self.placeholder = self.inputs.placeholder().requires_grad_()
        return replay(stage, self.inputs, entering, positions, layout, self.pass_lengths)

    def entering_gradient(self) -> Tensor:
        """After the backward pass: gradient of the hidden states that entered the stage, [S / shards, B, H]."""
        leaves = self.entering if self.placeholder is None else [self.placeholder]
        gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
        assert len(gradients) == len(leaves), "every pass passes a gradient on"
        return torch.cat(gradients)

    def release(self) -> None:
        """Free everything: the gradient has been taken."""
        self.pass_lengths, self.scores, self.entering, self.leaving = [], [], [], []
        self.inputs = self.placeholder = None


def join_scores(parts: Sequence[RowScores]) -> RowScores | None:
    """Scores of all tokens, first the K anchor rows with n choices each, then one choice for each later row.

    Returns:
        RowScores of K * B + (T * R) * B rows with n choices; of the later rows only the first column means anything.
        None if there are none (on all but the last stage).
    """
    if not parts:
        return None
    choices = parts[0].logprobs.shape[1]
    return RowScores(
        torch.cat([part.logprobs.expand(-1, choices) for part in parts]),
        torch.cat([part.normalizers for part in parts]),
    )


def sampled_logprobs(scores: Sequence[RowScores], plan: BlockPlan) -> Tensor:
    """Log-probabilities of a rollout's tokens by their places, from the scores of each token.

    Args:
        scores: of each of the G tokens, as `SavedForward.scores`: of the first K * B rows with n choices each, of a
            later one K * n * B rows with one.
    Returns:
        float32 [B, n, K, G].
    Communication: none.
    """
    samples, blocks = plan.num_samples, plan.num_blocks
    first, *later = (score.logprobs for score in scores)
    tokens = [first.view(blocks, -1, samples).permute(1, 2, 0)]  # [B, n, K]
    tokens += [logprobs.view(blocks, samples, -1).permute(2, 1, 0) for logprobs in later]
    return torch.stack(tokens, dim=-1)
