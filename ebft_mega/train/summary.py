"""A step's numbers over all ranks."""

import math
import resource

import torch
import torch.distributed as dist
from torch import Tensor

from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.reward.duplicates import duplicate_share
from ebft_mega.train.step import StepResult, Trainer


def step_metrics(trainer: Trainer, result: StepResult, learning_rate: float) -> dict[str, float]:
    """Exact global means of a step's losses and reward terms.

    Returns:
        Scalars under the `ebft/*`, `train/*` and `memory/*` names: nats per token for losses, bytes for memory.
    Communication: one all-reduce of a dozen float64 over the data-parallel group.
    """
    groups, ebft = trainer.groups, trainer.config.ebft
    sums: dict[str, Tensor] = {
        "ebft/rl_loss": torch.stack([item.terms.rl for item in result.learned]).sum(),
        "ebft/ce_loss": torch.stack([item.terms.ce for item in result.learned]).sum(),
    }
    if result.experiences:
        rewards = [experience.rewards for experience in result.experiences]
        advantages = torch.cat([experience.advantages.flatten() for experience in result.experiences])
        rollouts = torch.cat([experience.rollout.tokens for experience in result.experiences])
        sums |= {
            "ebft/alignment": torch.cat([item.alignment.flatten() for item in rewards]).mean(),
            "ebft/diversity": torch.cat([item.diversity.flatten() for item in rewards]).mean(),
            "ebft/mean_reward": torch.cat([item.reward.flatten() for item in rewards]).mean(),
            "ebft/cfm_loss": torch.cat([item.cfm.flatten() for item in rewards]).mean(),
            "ebft/duplicate_share": duplicate_share(rollouts),
            "advantage": advantages.mean(),
            "advantage_squared": advantages.square().mean(),
        }
    values = torch.stack([value.to(torch.float64) for value in sums.values()])
    # Loss shares already carry global denominators; every other entry is a mean over equally many local values.
    scale = [
        1.0 if key.endswith("_loss") and key != "ebft/cfm_loss" else 1.0 / groups.data_parallel_size for key in sums
    ]
    values = values * torch.tensor(scale, dtype=torch.float64, device=values.device)
    dist.all_reduce(values, group=groups.data_parallel)
    metrics = dict(zip(sums, values.tolist(), strict=True))
    if result.experiences:
        mean, square = metrics.pop("advantage"), metrics.pop("advantage_squared")
        metrics["ebft/advantages_std"] = math.sqrt(max(0.0, square - mean * mean))
    else:
        del metrics["ebft/rl_loss"]
    if ebft.ce_coef == 0:
        del metrics["ebft/ce_loss"]
    metrics["train/loss"] = ebft.rl_coef * metrics.get("ebft/rl_loss", 0.0) + ebft.ce_coef * metrics.get(
        "ebft/ce_loss", 0.0
    )
    metrics["train/grad_norm"] = result.update.grad_norm
    metrics["train/lr"] = learning_rate
    metrics["memory/peak_bytes"] = float(peak_memory_bytes(groups))
    return metrics


def speed_metrics(trainer: Trainer, step_seconds: float, phase_seconds: dict[str, float]) -> dict[str, float]:
    """Times of a step on this rank, and the whole job's throughput.

    Args:
        step_seconds: wall time of the step, loading included.
        phase_seconds: by phase: data, rollout, features, learn.
    Communication: none.
    """
    batch = trainer.config.train.global_batch_size
    metrics = {f"perf/{phase}_seconds": seconds for phase, seconds in phase_seconds.items()}
    metrics["perf/step_seconds"] = step_seconds
    metrics["perf/documents_per_second"] = batch / step_seconds
    if trainer.feature_network is not None:
        metrics["perf/rollout_tokens_per_second"] = batch * trainer.plan.generated_per_row / step_seconds
    return metrics


def peak_memory_bytes(groups: ProcessGroups) -> int:
    """The most memory this rank has held so far: allocated on its GPU, or resident on a CPU."""
    if groups.device.type == "cuda":
        return torch.cuda.max_memory_allocated(groups.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
