"""One optimizer step of strided Energy-Based Fine-Tuning (arXiv 2603.12248), in the order of the paper.

Rows of raw text -> n rollouts from every anchor -> inner products of features -> rewards -> advantages ->
REINFORCE on the rollouts (plus cross-entropy on the text) -> AdamW. Strictly on-policy: one update per rollout.
"""

from dataclasses import dataclass

from torch import Tensor

from ebft_mega.config.schema import RunConfig
from ebft_mega.features.network import FeatureNetwork
from ebft_mega.metrics.timers import PhaseTimers
from ebft_mega.objective.advantage import block_advantages
from ebft_mega.objective.losses import count_tokens, loss_terms
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.parallel.zero import Update, ZeroEngine
from ebft_mega.reward.closed_forms import block_rewards
from ebft_mega.rollout.generate import SamplingSettings, generate_rollouts
from ebft_mega.rollout.plan import BlockPlan
from ebft_mega.rollout.score import ScoreRequest, score
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


@dataclass(frozen=True)
class Experience:
    """What the policy did with a micro-batch and what it was worth."""

    rollout: Rollout
    gram: Tensor  # float64 [B, K, n + 1, n + 1]
    rewards: BlockRewards
    advantages: Tensor  # float64 [B, n, K]


@dataclass(frozen=True)
class Learned:
    """A micro-batch's log-probabilities and loss shares, detached."""

    logprobs: PolicyLogprobs
    terms: LossTerms


@dataclass(frozen=True)
class StepResult:
    """What happened in a step, per micro-batch of this rank."""

    micro_batches: tuple[TokenBatch, ...]
    experiences: tuple[Experience, ...]  # empty when rl_coef is 0
    learned: tuple[Learned, ...]
    update: Update


def train_step(trainer: Trainer, batch: TokenBatch, step: int, learning_rate: float) -> StepResult:
    """Sample, reward, learn, update.

    Args:
        batch: this rank's rows of the global batch.
        step: 0-based optimizer step; part of the sampling noise.
    Returns:
        StepResult of this rank; `train.summary.step_metrics` reduces it over ranks.
    Communication: collective over the data-parallel group: parameter gathers, gradient reductions, one norm.
    """
    config, timers, engine = trainer.config, trainer.timers, trainer.engine
    ebft = config.ebft
    micro_batches = batch.split(config.train.micro_batch_size)
    counts = count_tokens(trainer.plan, config.train.global_batch_size, ebft.rl_coef, ebft.ce_coef)

    experiences: tuple[Experience, ...] = ()
    if trainer.feature_network is not None:
        with timers.phase("rollout"), engine.whole_parameters() as policy:
            rollouts = [generate_rollouts(policy, rows, trainer.plan, trainer.sampling, step) for rows in micro_batches]
        with timers.phase("features"):
            experiences = tuple(
                judge(trainer.feature_network, rows, rollout, trainer.plan, config)
                for rows, rollout in zip(micro_batches, rollouts, strict=True)
            )

    learned = []
    with timers.phase("learn"):
        for index, rows in enumerate(micro_batches):
            experience = experiences[index] if experiences else None
            logprobs = policy_logprobs(trainer, rows, experience)
            terms = loss_terms(
                logprobs, experience.advantages if experience else None, counts, ebft.rl_coef, ebft.ce_coef
            )
            engine.backward(terms.total)
            learned.append(Learned(detached(logprobs), LossTerms(terms.rl, terms.ce, terms.total.detach())))
        update = engine.step(learning_rate)
    return StepResult(micro_batches, experiences, tuple(learned), update)


def judge(
    network: FeatureNetwork, rows: TokenBatch, rollout: Rollout, plan: BlockPlan, config: RunConfig
) -> Experience:
    """Rewards and advantages of a micro-batch's rollouts, from inner products of features alone.

    Communication: that of the feature network's layers.
    """
    ebft = config.ebft
    gram = network.grams(rows, rollout, plan)
    rewards = block_rewards(gram, ebft.reward_whitening, ebft.alignment_coef, ebft.diversity_coef)
    advantages = block_advantages(rewards, ebft.advantage_estimator, ebft.alignment_coef, ebft.diversity_coef)
    return Experience(rollout, gram, rewards, advantages)


def policy_logprobs(trainer: Trainer, rows: TokenBatch, experience: Experience | None) -> PolicyLogprobs:
    """The policy's forward with gradient: what was sampled, and the text itself where cross-entropy wants it.

    Communication: the engine's layer-by-layer parameter gathers.
    """
    ebft = trainer.config.ebft
    request = ScoreRequest(
        tokens=rows.tokens,
        rollouts=experience.rollout.tokens if experience else None,
        targets=ebft.ce_coef > 0,
        temperature=ebft.temperature,
    )
    scores = list(trainer.engine.forward(lambda policy: score(policy, request, trainer.plan)))
    return PolicyLogprobs(
        rollout=scores.pop(0) if request.rollouts is not None else None,
        target=scores.pop(0) if request.targets else None,
    )


def detached(logprobs: PolicyLogprobs) -> PolicyLogprobs:
    """The same values without their graph."""
    return PolicyLogprobs(
        rollout=None if logprobs.rollout is None else logprobs.rollout.detach(),
        target=None if logprobs.target is None else logprobs.target.detach(),
    )
