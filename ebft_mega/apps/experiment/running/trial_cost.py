"""What a trained run took: steps, text, counted FLOPs, CPU and wall seconds. No torch."""

from pathlib import Path

from ebft_mega.apps.experiment.runs.stamps import read_stamp
from ebft_mega.apps.experiment.trials import TrialCost
from ebft_mega.apps.report.run_records import curves, read_good_lines
from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.config.schema import RunConfig
from ebft_mega.cost.rollout_nodes import DistinctShares, RolloutNodes
from ebft_mega.cost.step_cost import StepShape, cost_of_step
from ebft_mega.errors import InputError
from ebft_mega.runtime.run_files import METRICS_NAME, MODEL_FOLDER

_DISTINCT = "perf/distinct_rows_share"  # of features, policy and head


def flops_of_run(
    config: RunConfig, policy: Architecture, features: Architecture, shares: DistinctShares | None = None
) -> float:
    """Count the FLOPs of all steps of a run, without its evaluations.

    Args:
        policy, features: architectures of the two networks.
        shares: of rows of rollouts that are distinct; None: no two begin alike, which is the most that it can be.
    """
    nodes = RolloutNodes.of_shares(config.block_plan, shares) if config.uses_rollouts else None
    shape = StepShape.of(config, policy, features, nodes)
    reuse = "activations" if config.learn.reuse_rollout == "auto" else config.learn.reuse_rollout
    cost = cost_of_step(shape, reuse, config.train.activation_checkpointing == "full")
    return float(cost.total) * config.train.global_batch_size * config.total_steps


def distinct_shares(run: Path) -> DistinctShares | None:
    """The mean shares of distinct rows that a run has recorded; None where it has none."""
    records, _ = read_good_lines(run / METRICS_NAME)
    by_key = curves(records)
    means = [
        sum(by_key[key][1]) / len(by_key[key][1]) if (key := f"{_DISTINCT}/{phase}") in by_key else None
        for phase in ("features", "policy", "head")
    ]
    return None if means[0] is None else DistinctShares(means[0], means[1], means[2])


def trial_cost(run: Path, config: RunConfig, features: Path | None) -> TrialCost:
    """What a finished run took.

    Args:
        features: directory of its frozen network; None: not known.
    """
    stamp = read_stamp(run)
    try:
        policy = Architecture.from_directory(run / MODEL_FOLDER)
        network = policy if features is None else Architecture.from_directory(features)
        flops: float | None = flops_of_run(config, policy, network, distinct_shares(run))
    except (InputError, ValueError):
        flops = None
    return TrialCost(
        steps=config.total_steps,
        tokens=config.total_steps * config.tokens_per_step,
        flops=flops,
        cpu_seconds=None if stamp is None else stamp.cpu_seconds,
        wall_seconds=None if stamp is None else stamp.wall_seconds,
    )
