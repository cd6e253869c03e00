"""Metrics of a step: losses and rewards as global means, times, throughput and memory. Add a new one here.

Other metrics are made elsewhere: `data/*` of the run so far, `perf/step_seconds_min` and `_max` and
`train/skipped_steps` in `train/loop.py`, `perf/checkpoint_seconds` in `train/hooks.py`, `eval/*` in
`evaluation/held_out.py`. Reports take the labels of `eval/*` from `apps/report/metric_names.py`, and the curves that
they draw from `apps/report/run_report.py`. docs/running.md lists all keys.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ebft_mega.attention.flex import num_compilations
from ebft_mega.cost.mfu import model_flops_utilisation
from ebft_mega.cost.rollout_nodes import DistinctShares, RolloutNodes
from ebft_mega.metrics.metric_keys import term_key
from ebft_mega.metrics.phase_memory import PhaseMemory
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.reward.duplicates import duplicate_share, has_duplicates
from ebft_mega.train.loss_masks import LossMasks
from ebft_mega.train.step import StepResult
from ebft_mega.train.trainer import Trainer

DISTINCT_ROWS = "perf/distinct_rows_share"


def step_metrics(trainer: Trainer, result: StepResult, learning_rate: float) -> dict[str, float]:
    """Exact global means of a step's losses and reward terms, over all that counts.

    Returns:
        Scalars under the `ebft/*` and `train/*` names: nats per token for losses. With document masking,
        `data/dropped_anchor_share`: of the blocks of real rows those that no document holds whole. Where damaged rows
        may be skipped, `data/skipped_rows` of this step. Means over blocks are left out of a step in which none counts.
        What is the mean of something that is not finite is NaN or infinite itself, never 0. `perf/distinct_rows_share/`
        of rollouts, by phase (`distinct_row_metrics`).
    Communication: one all-reduce over the data-parallel group, of a dozen float64 and three of each replica.
    """
    groups, ebft = trainer.groups, trainer.config.ebft
    sums: dict[str, Tensor] = {
        "ebft/rl_loss": torch.stack([item.terms.rl for item in result.learned]).sum(),
        "ebft/ce_loss": torch.stack([item.terms.ce for item in result.learned]).sum(),
    }
    if entropies := [item.terms.entropy for item in result.learned if item.terms.entropy is not None]:
        sums["train/entropy"] = torch.stack(entropies).sum()
    has_blocks = bool(result.experiences) and (result.masks is None or result.masks.num_blocks > 0)
    if has_blocks:
        rewards = [experience.rewards for experience in result.experiences]
        advantages = torch.cat([experience.advantages for experience in result.experiences])
        rollouts = torch.cat([experience.rollout.tokens for experience in result.experiences])
        of_blocks = {
            **{term_key(name): torch.cat([item.terms[name].values for item in rewards]) for name in rewards[0].terms},
            "ebft/mean_reward": torch.cat([item.reward for item in rewards]),
            "ebft/cfm_loss": torch.cat([item.cfm for item in rewards]),
            "advantage": advantages,
            "advantage_squared": advantages.square(),
        }
        if result.masks is None:
            # Every rank has equally many blocks.
            sums |= {name: values.mean() / groups.data_parallel_size for name, values in of_blocks.items()}
            sums["ebft/duplicate_share"] = duplicate_share(rollouts) / groups.data_parallel_size
        else:
            of_blocks["ebft/duplicate_share"] = has_duplicates(rollouts)
            counted, count = torch.cat(result.masks.blocks), result.masks.num_blocks
            sums |= {name: _counted_sum(values, counted) / count for name, values in of_blocks.items()}
    # All values are this rank's shares of global means: the loss shares were divided by global counts, too.
    values = torch.stack([value.to(torch.float64) for value in sums.values()])
    # Every replica's own shares, each in a place that is 0 on all others: their sum is a list of all.
    shares = [share for own in _distinct_shares(result).values() for share in _in_own_place(own, groups)]
    values = torch.cat((values, values.new_tensor(shares)))
    dist.all_reduce(values, group=groups.data_parallel)
    found = values.tolist()
    metrics = dict(zip(sums, found, strict=False)) | distinct_row_metrics(result, found[len(sums) :])
    if has_blocks:
        mean, square = metrics.pop("advantage"), metrics.pop("advantage_squared")
        variance = square - mean * mean
        # Rounding may leave a little less than nothing; `max` would make 0 of NaN.
        metrics["ebft/advantages_std"] = 0.0 if variance <= 0 else math.sqrt(variance)
    if not result.experiences:
        del metrics["ebft/rl_loss"]
    if not trainer.config.uses_targets:
        del metrics["ebft/ce_loss"]
    weights = {"ebft/rl_loss": ebft.rl_coef, "ebft/ce_loss": ebft.ce_coef, "train/entropy": -ebft.entropy_coef}
    metrics["train/loss"] = sum(weight * metrics.get(name, 0.0) for name, weight in weights.items())
    metrics["train/grad_norm"] = result.update.grad_norm
    metrics["train/lr"] = learning_rate
    return metrics | _mask_metrics(trainer, result.masks)


def _distinct_shares(result: StepResult) -> dict[str, float]:
    """Rows of this replica's rollouts, as shares of what they would be if nothing were merged.

    Of the policy's layers, of its head and of the feature network. The last token has no row in the policy, so with one
    token a rollout only features have a share. Communication: none; the host knows all counts.
    """
    forests = [experience.rollout.forest for experience in result.experiences]
    fed_back = [forest.up_to(len(forest.levels) - 1) for forest in forests]
    prefixes = [len(level.first) for forest in fed_back for level in forest.levels]
    fed, tokens = (sum(part.num_rollout_tokens for part in parts) for parts in (fed_back, forests))
    nodes, of_features = (sum(part.num_nodes for part in parts) for parts in (fed_back, forests))
    sizes = {"policy": (nodes, fed), "head": (sum(prefixes), fed), "features": (of_features, tokens)}
    return {phase: rows / most for phase, (rows, most) in sizes.items() if most}


def _in_own_place(value: float, groups: ProcessGroups) -> list[float]:
    """A number for every replica: the own one, and 0 for the others."""
    return [value if rank == groups.data_parallel_rank else 0.0 for rank in range(groups.data_parallel_size)]


def distinct_row_metrics(result: StepResult, of_replicas: Sequence[float]) -> dict[str, float]:
    """The mean share of each phase, and the largest: the replica that has it is the last to finish.

    Args:
        of_replicas: shares of all replicas in the first phase, then in the second, and so on.
    """
    metrics = {}
    phases = _distinct_shares(result)
    for index, phase in enumerate(phases):
        replicas = len(of_replicas) // len(phases)
        shares = of_replicas[index * replicas : (index + 1) * replicas]
        metrics[f"{DISTINCT_ROWS}/{phase}"] = sum(shares) / replicas
        metrics[f"{DISTINCT_ROWS}/{phase}_max"] = max(shares)
    return metrics


def _counted_sum(values: Tensor, counted: Tensor) -> Tensor:
    """Sum over counted blocks, bool [B, K], of means of values [B, K], [B, n, K] or [B, n, K, G]; float64."""
    by_block = values.to(torch.float64)
    if by_block.dim() == 4:
        by_block = by_block.mean(dim=-1)
    if by_block.dim() == 3:
        by_block = by_block.mean(dim=1)
    return by_block.masked_fill(~counted, 0.0).sum()


def _mask_metrics(trainer: Trainer, masks: LossMasks | None) -> dict[str, float]:
    """Share of anchors and number of rows of the global batch that did not enter the loss."""
    config, metrics = trainer.config, {}
    if masks is not None and config.data.document_masking and trainer.feature_network is not None:
        all_blocks = masks.num_rows * trainer.plan.num_blocks
        metrics["data/dropped_anchor_share"] = 1 - masks.num_blocks / all_blocks if all_blocks else 0.0
    if masks is not None and config.data.on_error == "skip":
        metrics["data/skipped_rows"] = float(config.train.global_batch_size - masks.num_rows)
    return metrics


def speed_metrics(
    trainer: Trainer,
    step_seconds: float,
    phase_seconds: Mapping[str, float],
    communication_seconds: float,
    peak_flops_per_device: float | None,
    shares: DistinctShares | None = None,
) -> dict[str, float]:
    """Times of a step on this rank, and the whole job's throughput.

    `perf/mfu` is what the devices did of the work that the step needs, `perf/mfu_without_merging` what they would have
    done in that time if no two rollouts had begun alike.

    Args:
        step_seconds: wall time of the step, loading included.
        phase_seconds: by phase: data, rollout, features, reward, learn, update.
        communication_seconds: time within the phases and between them that this rank communicated.
        peak_flops_per_device: floating-point operations per second; None leaves the utilisation out.
        shares: distinct rows of the step's rollouts, the mean over replicas; None: there are no rollouts.
    Communication: none.
    """
    config = trainer.config
    metrics = {f"perf/{phase}_seconds": seconds for phase, seconds in phase_seconds.items()}
    metrics["perf/communication_seconds"] = communication_seconds
    metrics["perf/step_seconds"] = step_seconds
    metrics["perf/documents_per_second"] = config.train.global_batch_size / step_seconds
    metrics["perf/tokens_per_second"] = config.train.global_batch_size * config.data.sequence_length / step_seconds
    policy = features = trainer.stage.architecture
    if trainer.feature_network is not None:
        features = trainer.feature_network.stage.architecture
        generated = config.train.global_batch_size * trainer.plan.generated_per_row
        metrics["perf/rollout_tokens_per_second"] = generated / step_seconds
    compiled = num_compilations()
    if compiled:  # it grows in the first step and at the first evaluation; later it would cost a minute each time
        metrics["perf/compiled_kernels"] = float(compiled)
    if peak_flops_per_device is not None:
        sizes = config, policy, features, step_seconds, dist.get_world_size(), peak_flops_per_device
        nodes = None if shares is None else RolloutNodes.of_shares(trainer.plan, shares)
        metrics["perf/mfu"] = model_flops_utilisation(*sizes, nodes)
        if nodes is not None:
            metrics["perf/mfu_without_merging"] = model_flops_utilisation(*sizes)
    return metrics


def distinct_shares_in(metrics: Mapping[str, float]) -> DistinctShares | None:
    """The shares that `step_metrics` has found; None: there are no rollouts."""
    features, policy, head = (metrics.get(f"{DISTINCT_ROWS}/{name}") for name in ("features", "policy", "head"))
    return None if features is None else DistinctShares(features, policy, head)


def memory_metrics(memory: PhaseMemory) -> dict[str, float]:
    """Bytes that this rank held at most: in each phase of the step, where that can be told, and so far in the run.

    Communication: none.
    """
    metrics = {f"memory/{phase}_peak_bytes": float(peak) for phase, peak in memory.peaks().items()}
    return metrics | {"memory/peak_bytes": float(memory.highest())}
