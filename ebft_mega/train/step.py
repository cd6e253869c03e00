"""One optimizer step of strided Energy-Based Fine-Tuning (arXiv 2603.12248), in the order of the paper.

Rows of raw text -> n rollouts from every anchor -> inner products of features -> rewards -> advantages ->
REINFORCE on the rollouts (plus cross-entropy on the text) -> AdamW. Strictly on-policy: one update per rollout.
What does not count (filler rows, blocks across masked documents) goes through all this with weight 0.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ebft_mega.block_plan import BlockPlan
from ebft_mega.config.schema import Reuse, RunConfig
from ebft_mega.features.network import FeatureNetwork
from ebft_mega.metrics.timers import PhaseTimers
from ebft_mega.model.stage import PipelinedModel, Stage
from ebft_mega.objective.advantage import block_advantages
from ebft_mega.objective.guard import guarded
from ebft_mega.objective.losses import count_tokens, loss_terms
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.parallel.pipeline import one_forward_one_backward, replayed_backward, share_from_last_stage
from ebft_mega.parallel.zero import Update, ZeroEngine
from ebft_mega.reward.alignment_and_diversity import block_rewards
from ebft_mega.rollout.forward import SavedForward
from ebft_mega.rollout.generate import Sampled, SamplingSettings, generate_rollouts
from ebft_mega.rollout.score import ScoreRequest, score
from ebft_mega.train.loss_masks import StepWeights, step_weights
from ebft_mega.types import BlockRewards, LossTerms, PolicyLogprobs, Rollout, TokenBatch


@dataclass(frozen=True)
class Trainer:
    """Everything a step needs and does not change."""

    config: RunConfig
    plan: BlockPlan
    sampling: SamplingSettings
    groups: ProcessGroups
    engine: ZeroEngine
    feature_network: FeatureNetwork | None  # None: rl_coef is 0
    timers: PhaseTimers
    reuse: Reuse = "off"  # what the gradient pass takes over from the rollout

    @property
    def stage(self) -> Stage:
        """This rank's part of the policy; what it is, not its parameters."""
        stage = self.engine.module
        assert isinstance(stage, Stage), "engines are built around stages"
        return stage

    @contextmanager
    def policy(self, recording: bool = False) -> Iterator[PipelinedModel]:
        """The policy with whole parameters, for passes without gradient or, if `recording`, with it.

        Communication: over the data-parallel group one gather of all parameters, unless they are held.
        """
        with self.engine.whole_parameters(recording) as run:
            yield PipelinedModel.of(self.stage, run)


@dataclass(frozen=True)
class Experience:
    """What the policy did with a micro-batch and what it was worth."""

    rollout: Rollout
    gram: Tensor  # float64 [B, K, n + 1, n + 1]
    rewards: BlockRewards
    advantages: Tensor  # float64 [B, n, K], 0 where a block does not count
    counted_blocks: Tensor | None = None  # bool [B, K], which blocks count; None: all

    @property
    def counted_reward(self) -> Tensor:
        """Rewards float64 [B, n, K], 0 where a block does not count."""
        reward = self.rewards.reward
        return reward if self.counted_blocks is None else reward.masked_fill(~self.counted_blocks[:, None], 0.0)


@dataclass(frozen=True)
class Learned:
    """A micro-batch's log-probabilities and loss shares, detached."""

    logprobs: PolicyLogprobs
    terms: LossTerms


@dataclass(frozen=True)
class StepResult:
    """What happened in a step, per micro-batch of this replica; the same on all of its ranks."""

    micro_batches: tuple[TokenBatch, ...]
    experiences: tuple[Experience, ...]  # empty when rl_coef is 0
    learned: tuple[Learned, ...]
    update: Update
    weights: StepWeights | None = None  # None: all rows and blocks count


def train_step(trainer: Trainer, batch: TokenBatch, step: int, learning_rate: float) -> StepResult:
    """Sample, reward, learn, update.

    Args:
        batch: this rank's rows of the global batch.
        step: 0-based optimizer step; part of the sampling noise.
    Returns:
        StepResult of this rank's replica; `train.summary.step_metrics` reduces it over replicas.
    Communication: collective over the world. Over the data-parallel group parameters are gathered and gradients
        reduced, and what `step_weights` says; within a replica see `generate_rollouts`, `FeatureNetwork.grams` and
        `learn`; one norm over all.
    """
    config, timers = trainer.config, trainer.timers
    micro_batches = batch.split(config.train.micro_batch_size)
    weights = step_weights(micro_batches, trainer.plan, config, trainer.groups)

    sampled: list[Sampled] = []
    experiences: list[Experience] = []
    if trainer.feature_network is not None:
        with timers.phase("rollout"), trainer.policy(recording=trainer.reuse == "activations") as policy:
            sampled = generate_rollouts(
                policy,
                micro_batches,
                trainer.plan,
                trainer.sampling,
                step,
                reuse=trainer.reuse,
                with_targets=trainer.reuse != "off" and config.ebft.ce_coef > 0,
            )
        rollouts = [item.rollout for item in sampled]
        with timers.phase("features"):
            grams = trainer.feature_network.grams(micro_batches, rollouts, trainer.plan)
        with timers.phase("reward"):
            counted: Sequence[Tensor | None] = weights.blocks if weights is not None else [None] * len(grams)
            experiences = [
                judge(gram, rollout, config, blocks)
                for gram, rollout, blocks in zip(grams, rollouts, counted, strict=True)
            ]
    with timers.phase("learn"):
        learned = learn(trainer, micro_batches, experiences, [item.saved for item in sampled], weights)
    with timers.phase("update"):
        update = trainer.engine.step(learning_rate)
    return StepResult(micro_batches, tuple(experiences), tuple(learned), update, weights)


def judge(gram: Tensor, rollout: Rollout, config: RunConfig, counted_blocks: Tensor | None = None) -> Experience:
    """Rewards and advantages of a micro-batch's rollouts, from inner products of features alone.

    Args:
        gram: float64 [B, K, n + 1, n + 1].
        counted_blocks: bool [B, K], blocks that count; None: all.
    Communication: none; every rank of a replica has the same matrices.
    """
    ebft = config.ebft
    rewards = block_rewards(gram, ebft.reward_whitening, ebft.alignment_coef, ebft.diversity_coef)
    advantages = block_advantages(rewards, ebft.advantage_estimator, ebft.alignment_coef, ebft.diversity_coef)
    if counted_blocks is not None:
        advantages = advantages.masked_fill(~counted_blocks[:, None], 0.0)
    return Experience(rollout, gram, rewards, advantages, counted_blocks)


def learn(
    trainer: Trainer,
    micro_batches: Sequence[TokenBatch],
    experiences: Sequence[Experience],
    saved: Sequence[SavedForward | None],
    weights: StepWeights | None = None,
) -> list[Learned]:
    """Add up the gradient of all micro-batches: the policy's forward with gradient, the loss, the way back.

    Args:
        experiences: per micro-batch; none when only the text is learned from.
        saved: per micro-batch the forward pass that its rollout was; if there is none, it is computed here.
        weights: what counts; None: everything.
    Returns:
        Log-probabilities and loss shares per micro-batch, the same on every rank of the replica.
    Communication: the engine's layer-by-layer parameter gathers; along the pipeline the gradients of hidden states
        (and, for a forward pass computed here, those); one broadcast of all log-probabilities and loss shares from
        its last stage.
    """
    ebft, plan, engine, groups = trainer.config.ebft, trainer.plan, trainer.engine, trainer.groups
    num_rows, num_blocks = trainer.config.train.global_batch_size, None
    if weights is not None:
        num_rows, num_blocks = weights.num_rows, weights.num_blocks
    counts = count_tokens(plan, num_rows, ebft.rl_coef, ebft.ce_coef, num_blocks)
    requests = [
        ScoreRequest(
            tokens=rows.tokens,
            rollouts=experiences[index].rollout.tokens if experiences else None,
            targets=ebft.ce_coef > 0,
            temperature=ebft.temperature,
            documents=rows.documents,
        )
        for index, rows in enumerate(micro_batches)
    ]
    forwards = {index: part for index, part in enumerate(saved) if part is not None}
    values: list[Tensor] = []  # on the last stage

    def forward(index: int, received: Tensor | None = None) -> Tensor:
        request = requests[index]
        scores = engine.forward(lambda stage: score(stage, request, plan, received, forwards.get(index)))
        if not groups.is_last_stage:
            return scores[0]
        advantages = experiences[index].advantages if experiences else None
        rows = weights.rows[index] if weights is not None else None
        terms = loss_terms(request.logprobs(scores), advantages, counts, ebft.rl_coef, ebft.ce_coef, rows)
        values.extend(value.detach() for value in (*scores, terms.rl, terms.ce, terms.total))
        return guarded(terms.total, [experiences[index].counted_reward] if experiences else [])

    def backward(output: Tensor, gradient: Tensor | None) -> None:
        if gradient is None:
            engine.backward(output)
        else:
            engine.backward_from(output, gradient)

    def hidden_buffer(index: int) -> Tensor:
        return trainer.stage.hidden.empty(requests[index].num_positions(plan), len(requests[index].tokens))

    if forwards:
        replayed_backward(
            groups,
            len(requests),
            forward,
            backward,
            entering_gradient=lambda index: forwards[index].entering_gradient(),
            release=lambda index: forwards[index].release(),
        )
    else:
        one_forward_one_backward(groups, len(requests), forward, backward, hidden_buffer)
    shapes = [shape for request in requests for shape in (*request.shapes(), (), (), ())]
    shared = iter(share_from_last_stage(values, shapes, torch.float32, groups))
    learned = []
    for request in requests:
        logprobs = request.logprobs([next(shared) for _ in request.shapes()])
        learned.append(Learned(logprobs, LossTerms(rl=next(shared), ce=next(shared), total=next(shared))))
    return learned
