"""One optimizer step of strided Energy-Based Fine-Tuning (arXiv 2603.12248), in the order of the paper.

Rows of raw text -> n rollouts from every anchor -> inner products of features -> rewards -> advantages ->
REINFORCE on the rollouts (plus cross-entropy on the text) -> AdamW. Strictly on-policy: one update per rollout.
Rows and blocks that do not count (filler rows, blocks across masked documents) are computed with weight 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ebft_mega.critic.fitted_critic import CriticStep
from ebft_mega.parallel.zero import LookAtGradient, Update
from ebft_mega.rollout.generate import Sampled, generate_rollouts
from ebft_mega.train.experience import make_experiences
from ebft_mega.train.gradient_pass import learn
from ebft_mega.train.loss_masks import LossMasks, loss_masks
from ebft_mega.train.trainer import Trainer
from ebft_mega.types import Experience, Learned, TokenBatch


def train_step(
    trainer: Trainer, batch: TokenBatch, step: int, learning_rate: float, look: LookAtGradient | None = None
) -> "StepResult":
    """Sample rollouts, reward them, add up the gradient, update the policy.

    Args:
        batch: this rank's rows of the global batch.
        step: 0-based optimizer step; part of the sampling noise.
        look: see `ZeroEngine.step`.
    Returns:
        StepResult of this rank's replica; `train.step_metrics.step_metrics` reduces it over replicas.
    Communication: collective over the world. Over the data-parallel group parameters are gathered and gradients
        reduced, and what `loss_masks` says; within a replica see `generate_rollouts`, `measure` and `learn`; over the
        world what `make_experiences` says, and one norm; with a token critic what `FittedCritic.learn` says.
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
        with_targets = reuse != "off" and config.uses_targets
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
        update = trainer.engine.step(learning_rate, look)
        if judged is not None and update.applied:
            judged.critic.learn(judged)
    return StepResult(micro_batches, tuple(experiences), tuple(learned), update, masks)


def measure(
    trainer: Trainer,
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


def observe_step(trainer: Trainer, batch: TokenBatch, step: int) -> None:
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


@dataclass(frozen=True)
class StepResult:
    """What happened in a step, per micro-batch of this replica; the same on all of its ranks."""

    micro_batches: tuple[TokenBatch, ...]
    experiences: tuple[Experience, ...]  # empty when rl_coef is 0
    learned: tuple[Learned, ...]
    update: Update
    masks: LossMasks | None = None  # None: all rows and blocks count
