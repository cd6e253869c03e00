"""Write the step trace: every tensor of one optimizer step, gathered, for comparison between parallel layouts."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from ebft_mega.critic.critic_trace import traced_values, traced_weights
from ebft_mega.critic.fitted_critic import FittedCritic
from ebft_mega.model.weights.gradient_projections import GradientProjections
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.train.step import StepResult, train_step
from ebft_mega.train.step_metrics import step_metrics
from ebft_mega.train.trainer import Trainer
from ebft_mega.types import TokenBatch


def trace_step(trainer: Trainer, batch: TokenBatch, output: Path, step: int = 0, noise: int = 0) -> None:
    """Run an optimizer step at the full learning rate and write `step.safetensors` and `step.json`.

    Args:
        batch: this rank's rows of the step's global batch.
        output: directory for the two files; made if needed.
        step: its number, part of the sampling noise.
        noise: added to the seed of that noise, which is taken modulo 2^64.
    Communication: collective over the world; every float32 master weight is gathered twice.
    """
    before = [parameter.double().cpu() for _, parameter in trainer.engine.local_parameters()]
    sampling = replace(trainer.sampling, seed=trainer.sampling.seed + noise)
    trainer = replace(trainer, sampling=sampling)
    projections = GradientProjections(trainer.stage)
    learned = _learned_by_estimator(trainer)  # before the step, which adds to it
    result = train_step(trainer, batch, step, trainer.config.train.lr, projections.look)
    checksums = _parameter_change(trainer, before)
    metrics = step_metrics(trainer, result, trainer.config.train.lr)
    projected = projections.total()
    tensors = _gather_rows(_local_tensors(result, trainer.critic), trainer.groups) | learned
    if not trainer.groups.is_world_first:
        return
    output.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output / "step.safetensors")
    figures = {
        "rl_loss": metrics.get("ebft/rl_loss"),
        "ce_loss": metrics.get("ebft/ce_loss"),
        "loss": metrics["train/loss"],
        "cfm_loss": metrics.get("ebft/cfm_loss"),
        "grad_norm": metrics["train/grad_norm"],
        **checksums,
    }
    numbers = {
        "step": step,
        "noise": noise,
        # Words for what JSON has no numbers for.
        **{name: value if value is None or math.isfinite(value) else str(value) for name, value in figures.items()},
        "gradient_projections": projected if result.update.applied else None,
        "layout": {
            "data_parallel": trainer.groups.data_parallel_size,
            "tensor_parallel": trainer.groups.tensor_parallel_size,
            "pipeline_parallel": trainer.groups.pipeline_size,
            "sequence_parallel": trainer.config.parallel.sequence_parallel,
            "zero_stage": trainer.config.zero.stage,
        },
        "config": trainer.config.model_dump(mode="json"),
    }
    (output / "step.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


def _parameter_change(trainer: Trainer, before: Sequence[Tensor]) -> dict[str, float]:
    """Checksums and the norm of the change over all parameters of the model, each counted once, in float64.

    Vocabulary padding is zero and stays zero, so it adds nothing.
    """
    roles, rank = trainer.stage.parameter_roles(), trainer.groups.tensor_parallel_rank
    sums = torch.zeros(3, dtype=torch.float64)
    for old, (name, parameter) in zip(before, trainer.engine.local_parameters(), strict=True):
        if roles[name].is_counted(rank):
            new = parameter.double().cpu()
            sums += torch.stack((old.abs().sum(), new.abs().sum(), (new - old).square().sum()))
    sums = sums.to(trainer.groups.device)
    dist.all_reduce(sums, group=trainer.groups.model_parallel)
    checksum_before, checksum_after, squared_update = sums.tolist()
    return {
        "parameter_checksum_before": checksum_before,
        "parameter_checksum_after": checksum_after,
        "update_norm": squared_update**0.5,
    }


def _learned_by_estimator(trainer: Trainer) -> dict[str, Tensor]:
    """What the token critic knows; nothing where there is none. Communication: that of `traced_weights`."""
    if trainer.critic is None or trainer.feature_network is None:
        return {}
    return traced_weights(trainer.critic, trainer.critic.state.weights, trainer.feature_network)


def _local_tensors(result: StepResult, critic: FittedCritic | None = None) -> dict[str, Tensor]:
    """This replica's rows of every traced tensor."""
    traced: dict[str, list[Tensor]] = {"tokens": [rows.tokens for rows in result.micro_batches]}
    for experience in result.experiences:
        traced.setdefault("rollouts", []).append(experience.rollout.tokens)
        traced.setdefault("gram", []).append(experience.gram)
        for name, term in experience.rewards.terms.items():
            traced.setdefault(name, []).append(term.values)
        traced.setdefault("reward", []).append(experience.rewards.reward)
        traced.setdefault("advantage", []).append(experience.advantages)
        if critic is not None:
            shape, device = tuple(experience.rollout.tokens.shape), experience.advantages.device
            for name, values in traced_values(experience.critic, shape, critic.rank, device).items():
                traced.setdefault(name, []).append(values)
    for rows, experience in zip(result.micro_batches, result.experiences, strict=False):
        if rows.documents is not None and experience.counted_blocks is not None:
            traced.setdefault("kept", []).append(experience.counted_blocks.to(torch.uint8))
    for learned in result.learned:
        if learned.logprobs.rollout is not None:
            traced.setdefault("logprobs", []).append(learned.logprobs.rollout)
        if learned.logprobs.target is not None:
            traced.setdefault("target_logprobs", []).append(learned.logprobs.target)
    return {name: torch.cat(parts) for name, parts in traced.items()}


def _gather_rows(tensors: dict[str, Tensor], groups: ProcessGroups) -> dict[str, Tensor]:
    """Concatenate the ranks' rows in global-batch order (each rank holds a contiguous slice)."""
    gathered = {}
    for name, tensor in tensors.items():
        parts = [torch.empty_like(tensor) for _ in range(groups.data_parallel_size)]
        dist.all_gather(parts, tensor.contiguous(), group=groups.data_parallel)
        gathered[name] = torch.cat(parts).cpu()
    return gathered
