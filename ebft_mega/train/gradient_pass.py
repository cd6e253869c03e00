"""The gradient pass of a step: the policy's forward pass with gradient, the loss, the backward pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ebft_mega.critic.fitted_critic import row_directions
from ebft_mega.model.head import LinearValues
from ebft_mega.objective.guard import guarded
from ebft_mega.objective.losses import count_tokens, loss_terms
from ebft_mega.parallel.pipeline import one_forward_one_backward, replayed_backward, share_from_last_stage
from ebft_mega.rollout.forward import SavedForward
from ebft_mega.rollout.score import ScoreRequest, score
from ebft_mega.train.loss_masks import LossMasks
from ebft_mega.train.trainer import Trainer
from ebft_mega.types import Experience, Learned, LossTerms, TokenBatch, TokenCounts


def learn(
    trainer: Trainer,
    micro_batches: Sequence[TokenBatch],
    experiences: Sequence[Experience],
    saved: Sequence[SavedForward | None],
    masks: LossMasks | None = None,
) -> list[Learned]:
    """Add up the gradient of all micro-batches: the policy's forward pass with gradient, the loss, the backward pass.

    Args:
        experiences: per micro-batch; none when only the text is learned from.
        saved: per micro-batch the forward pass that its rollout was; if there is none, it is computed here.
        masks: which rows and blocks count; None: all.
    Returns:
        Log-probabilities and loss shares per micro-batch, the same on every rank of the replica.
    Communication: the engine's layer-by-layer parameter gathers; along the pipeline the gradients of hidden states
        (and, for a forward pass computed here, those); one broadcast of all log-probabilities and loss shares from
        its last stage.
    """
    groups, count = trainer.groups, len(micro_batches)
    forwards = {index: forward for index, forward in enumerate(saved) if forward is not None}
    work = _GradientPass(trainer, micro_batches, experiences, forwards, masks)
    if forwards:
        replayed_backward(groups, count, work.forward, work.backward, work.entering_gradient, work.release)
    else:
        one_forward_one_backward(groups, count, work.forward, work.backward, work.hidden_buffer)
    return work.learned()


class _GradientPass:
    """What this stage does with each micro-batch when the pipeline's schedule says so."""

    def __init__(
        self,
        trainer: Trainer,
        micro_batches: Sequence[TokenBatch],
        experiences: Sequence[Experience],
        saved: dict[int, SavedForward],
        masks: LossMasks | None,
    ):
        self.trainer, self.experiences, self.saved, self.masks = trainer, experiences, saved, masks
        ebft, critic = trainer.config.ebft, trainer.critic
        self.table = None if critic is None else trainer.vocabulary.own_rows(critic.table)
        self.requests = [
            ScoreRequest(
                tokens=rows.tokens,
                forest=experiences[index].rollout.forest if experiences else None,
                targets=trainer.config.uses_targets,
                temperature=ebft.temperature,
                documents=rows.documents,
                values=self._values(experiences[index]) if experiences else None,
                entropies=ebft.entropy_coef > 0,
            )
            for index, rows in enumerate(micro_batches)
        ]
        num_rows, num_blocks, num_targets = trainer.config.train.global_batch_size, None, None
        if masks is not None:
            num_rows, num_blocks, num_targets = masks.num_rows, masks.num_blocks, masks.num_targets
        self.counts: TokenCounts = count_tokens(
            trainer.plan, num_rows, ebft.rl_coef, ebft.ce_coef, num_blocks, num_targets, ebft.entropy_coef
        )
        self.values: list[Tensor] = []  # last stage: log-probabilities and loss shares, detached

    def _values(self, experience: Experience) -> LinearValues | None:
        """Values of next tokens, whose expectation the loss adds; None: there are none."""
        if self.table is None or experience.critic is None:
            return None
        return LinearValues(self.table, row_directions(experience.critic, experience.rollout.forest))

    def forward(self, index: int, received: Tensor | None = None) -> Tensor:
        """Hidden states for the next stage, or on the last one the loss to descend."""
        trainer, request, ebft = self.trainer, self.requests[index], self.trainer.config.ebft
        saved = self.saved.get(index)
        scores = trainer.engine.forward(lambda stage: score(stage, request, trainer.plan, received, saved))
        if not trainer.groups.is_last_stage:
            return scores[0]
        advantages = self.experiences[index].advantages if self.experiences else None
        rows, blocks, targets = (None, None, None) if self.masks is None else self.masks.of(index)
        logprobs, coefficients = request.logprobs(scores), (ebft.rl_coef, ebft.ce_coef)
        terms = loss_terms(logprobs, advantages, self.counts, *coefficients, rows, blocks, targets, ebft.entropy_coef)
        self.values.extend(value.detach() for value in (*scores, *_values_of(terms)))
        return guarded(terms.total, self.experiences[index].loss_inputs if self.experiences else ())

    def backward(self, output: Tensor, gradient: Tensor | None) -> None:
        """Accumulate the gradient of what `forward` returned."""
        if self.trainer.noise is not None:
            self.trainer.noise.begin_micro_batch()
        if gradient is None:
            self.trainer.engine.backward(output)
        else:
            self.trainer.engine.backward_from(output, gradient)

    def hidden_buffer(self, index: int) -> Tensor:
        """For the hidden states that the stage before sends."""
        request = self.requests[index]
        return self.trainer.stage.hidden.empty(request.num_positions(self.trainer.plan))

    def entering_gradient(self, index: int) -> Tensor:
        """Gradient of the hidden states that entered the stage in a saved forward pass."""
        return self.saved[index].entering_gradient()

    def release(self, index: int) -> None:
        """Free a saved forward pass."""
        self.saved[index].release()

    def learned(self) -> list[Learned]:
        """Log-probabilities and loss shares of all micro-batches, on every stage; one broadcast."""
        entropies = self.trainer.config.ebft.entropy_coef > 0
        of_terms: list[tuple[int, ...]] = [()] * (3 + entropies)
        shapes = [shape for request in self.requests for shape in (*request.shapes(), *of_terms)]
        shared = iter(share_from_last_stage(self.values, shapes, torch.float32, self.trainer.groups))
        learned = []
        for request in self.requests:
            logprobs = request.logprobs([next(shared) for _ in request.shapes()])
            learned.append(Learned(logprobs, LossTerms(*(next(shared) for _ in of_terms))))
        return learned


def _values_of(terms: LossTerms) -> list[Tensor]:
    """Those that are computed, in the order of the fields."""
    return [value for value in (terms.rl, terms.ce, terms.total, terms.entropy) if value is not None]
