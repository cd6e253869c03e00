"""One optimizer step of strided Energy-Based Fine-Tuning (arXiv 2603.12248), in the order of the paper.

Rows of raw text -> n rollouts from every anchor -> inner products of features -> rewards -> advantages ->
REINFORCE on the rollouts (plus cross-entropy on the text) -> AdamW. Strictly on-policy: one update per rollout.
Rows and blocks that do not count (filler rows, blocks across masked documents) are computed with weight 0.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ebft_mega.block_plan import BlockPlan
from ebft_mega.config.schema import Reuse, RunConfig
from ebft_mega.critic.fitted_critic import CriticStep, FittedCritic, row_directions
from ebft_mega.features.network import FeatureNetwork
from ebft_mega.metrics.timers import PhaseTimers
from ebft_mega.model.head import LinearValues
from ebft_mega.model.stage import PipelinedModel, Stage
from ebft_mega.objective.guard import guarded
from ebft_mega.objective.losses import count_tokens, loss_terms
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.parallel.pipeline import one_forward_one_backward, replayed_backward, share_from_last_stage
from ebft_mega.parallel.vocabulary import VocabularySlice
from ebft_mega.parallel.zero import Update, ZeroEngine
from ebft_mega.reward.sampled_blocks import Decode
from ebft_mega.rollout.forward import SavedForward
from ebft_mega.rollout.generate import Sampled, SamplingSettings, generate_rollouts
from ebft_mega.rollout.score import ScoreRequest, score
from ebft_mega.train.experience import Rewarding, make_experiences
from ebft_mega.train.loss_masks import LossMasks, loss_masks
from ebft_mega.types import Experience, Learned, LossTerms, TokenBatch, TokenCounts


def train_step(trainer: "Trainer", batch: TokenBatch, step: int, learning_rate: float) -> "StepResult":
    """Sample rollouts, reward them, add up the gradient, update the policy.

    Args:
        batch: this rank's rows of the global batch.
        step: 0-based optimizer step; part of the sampling noise.
    Returns:
        StepResult of this rank's replica; `train.step_metrics.step_metrics` reduces it over replicas.
    Communication: collective over the world. Over the data-parallel group parameters are gathered and gradients
        reduced, and what `loss_masks` says; within a replica see `generate_rollouts`, `FeatureNetwork.grams` and
        `learn`; over the world what `make_experiences` says, and one norm.
    Raises:
        EntryError: on all ranks alike, for an entry that does not hold its contract.
    """
    config, plan, timers = trainer.config, trainer.plan, trainer.timers
    micro_batches = batch.split(config.train.micro_batch_size)
    masks = loss_masks(micro_batches, plan, config, trainer.groups)

    sampled: list[Sampled] = []
    experiences: list[Experience] = []
    judged: CriticStep | None = None
    if trainer.feature_network is not None:
        reuse = trainer.reuse
        with_targets = reuse != "off" and config.ebft.ce_coef > 0
        with timers.phase("rollout"), trainer.policy(recording=reuse == "activations") as policy:
            with_logprobs = "logprobs" in trainer.rewarding.needs
            table = None if trainer.critic is None else trainer.critic.table
            sampled = generate_rollouts(
                policy, micro_batches, plan, trainer.sampling, step, reuse, with_targets, with_logprobs, table
            )
        counted_blocks = None if masks is None else masks.blocks
        with timers.phase("features"):
            grams, judged = measure(trainer, micro_batches, sampled, counted_blocks)
        with timers.phase("reward"):
            values = None if judged is None else judged.values
            experiences = make_experiences(
                trainer.rewarding, micro_batches, sampled, grams, counted_blocks, trainer.groups.device, values
            )
    with timers.phase("learn"):
        learned = learn(trainer, micro_batches, experiences, [item.saved for item in sampled], masks)
    with timers.phase("update"):
        update = trainer.engine.step(learning_rate)
        if trainer.critic is not None and judged is not None and update.applied:
            trainer.critic.learn(judged)
    return StepResult(micro_batches, tuple(experiences), tuple(learned), update, masks)


def measure(
    trainer: "Trainer",
    micro_batches: Sequence[TokenBatch],
    sampled: Sequence[Sampled],
    counted_blocks: Sequence[Tensor] | None,
) -> tuple[list[Tensor], CriticStep | None]:
    """Inner products of features, and what the token critic makes of features before they are forgotten.

    Args:
        counted_blocks: bool [B, K] each, blocks that count; None: all.
    Returns:
        Gram matrices float64 [B, K, n + 1, n + 1] by micro-batch; None where the estimator reads no critic.
    Communication: that of `FeatureNetwork.grams` and, for each micro-batch, of `CriticStep.take`.
    """
    assert trainer.feature_network is not None, "there are rollouts"
    rollouts = [item.rollout for item in sampled]
    if trainer.critic is None:
        return trainer.feature_network.grams(micro_batches, rollouts, trainer.plan), None
    judged = trainer.critic.of_step(micro_batches, sampled, counted_blocks)
    return trainer.feature_network.grams(micro_batches, rollouts, trainer.plan, judged.take), judged


def observe_step(trainer: "Trainer", batch: TokenBatch, step: int) -> None:
    """Let the token critic learn from a batch as a step would, without a gradient and without an update.

    Args:
        batch, step: as for `train_step`.
    Communication: that of `train_step`'s rollouts and features, and of `FittedCritic.learn`. None without a critic.
    """
    if trainer.critic is None:
        return
    micro_batches = batch.split(trainer.config.train.micro_batch_size)
    masks = loss_masks(micro_batches, trainer.plan, trainer.config, trainer.groups)
    with trainer.policy() as policy:
        sampled = generate_rollouts(
            policy, micro_batches, trainer.plan, trainer.sampling, step, table=trainer.critic.table
        )
    _, judged = measure(trainer, micro_batches, sampled, None if masks is None else masks.blocks)
    assert judged is not None, "there is a critic"
    trainer.critic.learn(judged)


def learn(
    trainer: "Trainer",
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
        trainer: "Trainer",
        micro_batches: Sequence[TokenBatch],
        experiences: Sequence[Experience],
        saved: dict[int, SavedForward],
        masks: LossMasks | None,
    ):
        self.trainer, self.experiences, self.saved, self.masks = trainer, experiences, saved, masks
        ebft = trainer.config.ebft
        self.requests = [
            ScoreRequest(
                tokens=rows.tokens,
                forest=experiences[index].rollout.forest if experiences else None,
                targets=ebft.ce_coef > 0,
                temperature=ebft.temperature,
                documents=rows.documents,
                values=self._values(experiences[index]) if experiences else None,
            )
            for index, rows in enumerate(micro_batches)
        ]
        num_rows, num_blocks, num_targets = trainer.config.train.global_batch_size, None, None
        if masks is not None:
            num_rows, num_blocks, num_targets = masks.num_rows, masks.num_blocks, masks.num_targets
        self.counts: TokenCounts = count_tokens(
            trainer.plan, num_rows, ebft.rl_coef, ebft.ce_coef, num_blocks, num_targets
        )
        self.values: list[Tensor] = []  # last stage: log-probabilities and loss shares, detached

    def _values(self, experience: Experience) -> LinearValues | None:
        """Values of next tokens, whose expectation the loss adds; None: there are none."""
        critic = self.trainer.critic
        if critic is None or experience.critic is None:
            return None
        table = self.trainer.vocabulary.own_rows(critic.table)
        return LinearValues(table, row_directions(experience.critic, experience.rollout.forest))

    def forward(self, index: int, received: Tensor | None = None) -> Tensor:
        """Hidden states for the next stage, or on the last one the loss to descend."""
        trainer, request, ebft = self.trainer, self.requests[index], self.trainer.config.ebft
        saved = self.saved.get(index)
        scores = trainer.engine.forward(lambda stage: score(stage, request, trainer.plan, received, saved))
        if not trainer.groups.is_last_stage:
            return scores[0]
        advantages = self.experiences[index].advantages if self.experiences else None
        masks = () if self.masks is None else self.masks.of(index)
        logprobs = request.logprobs(scores)
        terms = loss_terms(logprobs, advantages, self.counts, ebft.rl_coef, ebft.ce_coef, *masks)
        self.values.extend(value.detach() for value in (*scores, terms.rl, terms.ce, terms.total))
        return guarded(terms.total, self.experiences[index].loss_inputs if self.experiences else ())

    def backward(self, output: Tensor, gradient: Tensor | None) -> None:
        """Accumulate the gradient of what `forward` returned."""
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
        shapes = [shape for request in self.requests for shape in (*request.shapes(), (), (), ())]
        shared = iter(share_from_last_stage(self.values, shapes, torch.float32, self.trainer.groups))
        learned = []
        for request in self.requests:
            logprobs = request.logprobs([next(shared) for _ in request.shapes()])
            learned.append(Learned(logprobs, LossTerms(rl=next(shared), ce=next(shared), total=next(shared))))
        return learned


@dataclass(frozen=True)
class StepResult:
    """What happened in a step, per micro-batch of this replica; the same on all of its ranks."""

    micro_batches: tuple[TokenBatch, ...]
    experiences: tuple[Experience, ...]  # empty when rl_coef is 0
    learned: tuple[Learned, ...]
    update: Update
    masks: LossMasks | None = None  # None: all rows and blocks count


@dataclass(frozen=True)
class Trainer:
    """Everything that a step needs and that does not change from step to step."""

    config: RunConfig
    plan: BlockPlan
    sampling: SamplingSettings
    groups: ProcessGroups
    engine: ZeroEngine[Stage]
    feature_network: FeatureNetwork | None  # None: rl_coef is 0
    timers: PhaseTimers
    reuse: Reuse = "off"  # what the gradient pass reuses of the rollout's forward pass
    decode: Decode | None = None  # token ids to text; None: no entry declares texts
    critic: FittedCritic | None = None  # None: the estimator reads none

    @cached_property
    def rewarding(self) -> Rewarding:
        """The terms of the reward and the estimator of advantages that the configuration names."""
        return Rewarding.of(self.config, self.decode)

    @property
    def stage(self) -> Stage:
        """This rank's part of the policy: its modules and sizes; the parameters may be partitioned."""
        return self.engine.module

    @property
    def vocabulary(self) -> VocabularySlice:
        """The tokens whose logits this rank computes."""
        return VocabularySlice.of(self.stage.architecture.vocab_size, self.groups)

    @contextmanager
    def policy(self, recording: bool = False) -> Iterator[PipelinedModel]:
        """The policy with whole parameters, for passes without gradient or, if `recording`, with it.

        Communication: over the data-parallel group one gather of all parameters, unless they are held.
        """
        with self.engine.whole_parameters(recording) as run:
            yield PipelinedModel.of(self.stage, run)
