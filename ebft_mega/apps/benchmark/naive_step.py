"""The naive baseline: one optimizer step as the existing EBFT trainers do it, on this package's layers and losses.

Every generated token costs a forward over the whole row, once per sample; nothing is cached, shared or left out. Only
the attention mask is better than theirs: it is built once and without loops.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ebft_mega.apps.benchmark.step_major import (
    DenseKernel,
    DenseLayout,
    dense_layout,
    feature_positions,
    predicting_positions,
    step_major_sequence,
)
from ebft_mega.features.gram import block_grams
from ebft_mega.forest import Forest
from ebft_mega.model.stage import PipelinedModel, Stage
from ebft_mega.objective.guard import guarded
from ebft_mega.objective.losses import count_tokens, loss_terms
from ebft_mega.reward.duplicates import copy_duplicate_rows
from ebft_mega.rollout.noise import noise_keys
from ebft_mega.rollout.sampling import sample_tokens
from ebft_mega.train.experience import make_experience
from ebft_mega.train.trainer import Trainer
from ebft_mega.types import Experience, PolicyLogprobs, Rollout, TokenBatch


@dataclass(frozen=True)
class NaiveTrainer:
    """The baseline: a trainer's policy and optimizer, and a frozen network with all its layers and its head."""

    trainer: Trainer
    feature_stage: Stage
    kernel: DenseKernel

    def layout(self, tokens_per_block: int) -> DenseLayout:
        """Dense attention over a row and the first `tokens_per_block` tokens of each block."""
        hidden = self.feature_stage.hidden
        return dense_layout(self.trainer.plan, tokens_per_block, self.kernel, hidden.dtype, hidden.device)


@dataclass(frozen=True)
class NaiveResult:
    """Results of a naive step, by micro-batch."""

    experiences: tuple[Experience, ...]
    logprobs: tuple[PolicyLogprobs, ...]
    loss: float
    grad_norm: float


def naive_step(naive: NaiveTrainer, batch: TokenBatch, step: int, learning_rate: float) -> NaiveResult:
    """Run the step of `train.step.train_step` (sample, reward, learn, update) with the same noise.

    Args:
        batch: the rows of the step.
        step: part of the sampling noise.
    Communication: none; it needs a world of one process.
    """
    trainer = naive.trainer
    timers, config = trainer.timers, trainer.config
    micro_batches = batch.split(config.train.micro_batch_size)
    with timers.phase("rollout"), trainer.policy() as policy:
        rollouts = [naive_rollout(naive, policy, rows, step) for rows in micro_batches]
    with timers.phase("features"):
        grams = [naive_gram(naive, rows, rollout) for rows, rollout in zip(micro_batches, rollouts, strict=True)]
    with timers.phase("reward"):
        experiences = [
            make_experience(gram, rollout, trainer.rewarding, None, rows.tokens)
            for gram, rollout, rows in zip(grams, rollouts, micro_batches, strict=True)
        ]
    with timers.phase("learn"):
        logprobs, loss = _learn(naive, micro_batches, experiences)
    with timers.phase("update"):
        update = trainer.engine.step(learning_rate)
    return NaiveResult(tuple(experiences), tuple(logprobs), loss, update.grad_norm)


@torch.no_grad()
def naive_rollout(naive: NaiveTrainer, policy: PipelinedModel, rows: TokenBatch, step: int) -> Rollout:
    """Sample with one forward per token over the row and all tokens so far, with logits of every position."""
    trainer = naive.trainer
    plan, sampling = trainer.plan, trainer.sampling
    num_rows, device = len(rows.tokens), rows.tokens.device
    rollouts = rows.tokens.new_empty((num_rows, plan.num_samples, plan.num_blocks, 0))
    for token in range(plan.generate_length):
        sequence, positions = step_major_sequence(rows.tokens, rollouts, plan)
        layout = naive.layout(token)

        def all_logits(
            stage: Stage, sequence: Tensor = sequence, positions: Tensor = positions, layout: DenseLayout = layout
        ) -> Tensor:
            return logits_of_all(stage, stage.hidden_states(sequence, positions, layout))

        logits = policy.run(all_logits)[:, predicting_positions(plan, device)[:, token]].flatten(0, 1)  # [B * n * K, V]
        keys = noise_keys(sampling.seed, step, rows.row_indices, plan.num_samples, plan.num_blocks, token)
        each = torch.arange(len(logits), device=device).view(keys.shape)
        drawn = sample_tokens(logits, each, keys, sampling.temperature, sampling.top_p, policy.vocabulary)
        rollouts = torch.cat((rollouts, drawn[..., None]), dim=-1)
    return Rollout(rollouts, Forest.of(rollouts, merges=False))


@torch.no_grad()
def naive_gram(naive: NaiveTrainer, rows: TokenBatch, rollout: Rollout) -> Tensor:
    """Compute inner products of features after running all layers and the head of the feature network.

    Returns:
        float64 [B, K, n + 1, n + 1].
    """
    trainer, stage = naive.trainer, naive.feature_stage
    plan, network = trainer.plan, trainer.feature_network
    assert network is not None, "the baseline is a step with rollouts"
    sequence, positions = step_major_sequence(rows.tokens, rollout.tokens, plan)
    states = [stage.embed(sequence)]
    for layer in stage.layers:
        states.append(layer(states[-1], naive.layout(plan.generate_length), rotary_pos_emb=stage.angles(positions))[0])
    logits_of_all(stage, states[-1])
    states[-1] = _final_norm(stage, states[-1])
    generated, targets = feature_positions(plan, network.recipe.window, sequence.device)
    taps = []
    for depth in network.taps:
        state = states[depth].transpose(0, 1).unflatten(0, (len(rows.tokens), plan.num_samples))  # [B, n, S, H]
        of_samples = state[:, :, generated].transpose(1, 2)  # [B, K, n, T, H]
        taps.append(torch.cat((of_samples, state[:, :1, targets].transpose(1, 2)), dim=2))
    shape = tuple(taps[0].shape[:-1])
    recipe = network.recipe
    gram = block_grams(taps, shape, recipe, stage.groups, sequence.device, recipe.layer_weights)
    return copy_duplicate_rows(gram, rollout.tokens)


def _learn(
    naive: NaiveTrainer, micro_batches: Sequence[TokenBatch], experiences: Sequence[Experience]
) -> tuple[list[PolicyLogprobs], float]:
    """Forward with gradient over every position, then backward, per micro-batch."""
    trainer = naive.trainer
    ebft, train = trainer.config.ebft, trainer.config.train
    counts = count_tokens(trainer.plan, train.global_batch_size, ebft.rl_coef, ebft.ce_coef)
    logprobs, loss = [], 0.0
    for rows, experience in zip(micro_batches, experiences, strict=True):
        with trainer.timers.phase("policy_forward"):
            scores = trainer.engine.forward(functools.partial(naive_scores, naive, rows, experience.rollout))
            scored = PolicyLogprobs(scores[0], scores[1] if ebft.ce_coef > 0 else None)
            terms = loss_terms(scored, experience.advantages, counts, ebft.rl_coef, ebft.ce_coef)
        with trainer.timers.phase("policy_backward"):
            trainer.engine.backward(guarded(terms.total, [experience.rewards.reward]))
        target = None if scored.target is None else scored.target.detach()
        logprobs.append(PolicyLogprobs(scores[0].detach(), target))
        loss += terms.total.item()
    return logprobs, loss


def naive_scores(naive: NaiveTrainer, rows: TokenBatch, rollout: Rollout, stage: Stage) -> tuple[Tensor, ...]:
    """Compute log-probabilities from the logits of every position of every sample's sequence.

    Returns:
        Those of rollouts, float32 [B, n, K, G]; with `ce_coef` > 0 also those of the row's own tokens, float32
        [B, P - 1], the mean over the n copies of the row.
    """
    plan, ebft = naive.trainer.plan, naive.trainer.config.ebft
    sequence, positions = step_major_sequence(rows.tokens, rollout.tokens, plan)
    logits = logits_of_all(stage, stage.hidden_states(sequence, positions, naive.layout(plan.generate_length)))
    samples = (len(rows.tokens), plan.num_samples)
    predicting = predicting_positions(plan, sequence.device)
    labels = torch.zeros_like(sequence)  # one per position; the result is not read where nothing is predicted
    labels[:, predicting] = rollout.tokens.flatten(0, 1)
    scores = _logprobs(logits, labels, ebft.temperature)
    of_rollouts = scores[:, predicting].unflatten(0, samples)
    if ebft.ce_coef == 0:
        return (of_rollouts,)
    targets = _logprobs(logits[:, : plan.sequence_length - 1], sequence[:, 1 : plan.sequence_length], 1.0)
    return of_rollouts, targets.unflatten(0, samples).mean(dim=1)


def logits_of_all(stage: Stage, hidden: Tensor) -> Tensor:
    """Compute logits of every position, with gradient if it is being recorded.

    Args:
        hidden: [S, B, H] before the final norm.
    Returns:
        [B, S, V].
    """
    assert stage.embedding is not None and stage.head is not None, "the baseline's models are whole"
    weight = stage.embedding.weight if stage.head.weight is None else stage.head.weight
    rows = _final_norm(stage, hidden).transpose(0, 1)
    return F.linear(rows.flatten(0, 1), weight).unflatten(0, rows.shape[:2])


def _final_norm(stage: Stage, hidden: Tensor) -> Tensor:
    assert stage.final_norm is not None, "the baseline's models are whole"
    normalised: Tensor = stage.final_norm(hidden)
    return normalised


def _logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Log-probability of one token per position, float32 [B, S], from logits [B, S, V]."""
    scaled = logits.float() / temperature
    return -F.cross_entropy(scaled.flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)
