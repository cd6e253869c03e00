"""The work of a step as a table: by phase, without merging and, for given shares of distinct rows, with it."""

from collections.abc import Sequence

from ebft_mega.config.schema import Reuse, RunConfig
from ebft_mega.cost.rollout_nodes import DistinctShares, RolloutNodes
from ebft_mega.cost.step_cost import StepShape, cost_of_step
from ebft_mega.errors import InputError, Problem

TERA = 1e12
OPTION = "--distinct-shares"


def work_text(config: RunConfig, shape: StepShape, reuse: Reuse, shares: DistinctShares | None) -> str:
    """TFLOP of the matrix products of a step, of all replicas together, by phase; what the token critic solves, once.

    Args:
        shape: of the run's steps; reuse: what learning takes over from the rollouts.
        shares: of rows of rollouts; None: they are not known.
    Raises:
        InputError: no rollouts have such shares, or the run has no rollouts.
    """
    if shares is not None and not config.uses_rollouts:
        raise InputError([Problem(OPTION, "ebft.rl_coef", "a run without rollouts", "no shares for it")])
    try:
        known = [RolloutNodes.of_shares(shape.plan, each) for each in (None, shares)[: 1 if shares is None else 2]]
    except ValueError as error:
        raise InputError([Problem(OPTION, "SHARE", str(error), "shares of rollouts")]) from None
    again = config.train.activation_checkpointing == "full"
    costs = [cost_of_step(shape.with_nodes(nodes), reuse, again) for nodes in known]
    rows = [["", "nothing merged", "with the shares", "ratio"][: 2 if shares is None else 4]]
    count = config.train.global_batch_size
    for phase in costs[0].phases:
        if phase == "update" and shape.critic is None:
            continue  # it has no matrix products
        rows.append([phase.replace("_", " "), *_figures([cost.phases[phase].total * count for cost in costs])])
    rows.append(["total", *_figures([cost.total * count for cost in costs])])
    if shape.critic is not None:
        rows.append(["of it the token critic", *_figures([cost.critic * count for cost in costs])])
    twice = [sum(phase.recomputed.total for phase in cost.phases.values()) * count for cost in costs]
    rows.append(["of it done a second time", *_figures(twice)])
    lines = aligned(rows)
    if shape.critic is not None:
        lines.append(f"The token critic is {costs[-1].critic / costs[-1].total:.1%} of the total, once it is used.")
    if config.uses_rollouts and not config.ebft.merge_equal_prefixes:
        lines.append("This run merges nothing: ebft.merge_equal_prefixes is false.")
    elif config.uses_rollouts and shares is None:
        lines.append(f"What rollouts begin with alike is computed once; {OPTION} says what that leaves.")
    return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the first column to the left and all others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
    return lines


def _figures(flops: Sequence[int]) -> list[str]:
    """TFLOP, and of two of them the second over the first; nothing is no share of nothing."""
    texts = [f"{value / TERA:,.4g}" for value in flops]
    if len(flops) < 2:
        return texts
    return [*texts, f"{flops[1] / flops[0]:.3f}" if flops[0] else ""]
