"""The page of a study: the same arms over several seeds, with the spread between seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from ebft_mega.apps.report.arm_comparison import NUM_RESAMPLES, format_interval
from ebft_mega.apps.report.evaluations import Evaluation, evaluation_facts, left_out_notes, read_evaluations
from ebft_mega.apps.report.metric_names import EVALUATION_METRICS, EvaluationMetric
from ebft_mega.apps.report.page import Figure, Table, write_page
from ebft_mega.apps.report.plots import draw_intervals
from ebft_mega.errors import InputError, Problem
from ebft_mega.evaluation.bootstrap import Interval, paired_bootstrap
from ebft_mega.io.durable import write_json

CAVEATS = (
    "Every seed trains its own warm start and arms. The interval is over held-out rows, of the differences "
    "averaged over seeds; the spread is the standard deviation between seeds.",
    "A direction is named only if the interval leaves out zero and every seed agrees on the sign.",
)
DIRECTIONS = {1: "higher", -1: "lower", 0: "no difference shown"}


@dataclass(frozen=True)
class SeedDifference:
    """One arm minus another on one metric, over all seeds."""

    arm: str
    against: str
    metric: EvaluationMetric
    by_seed: tuple[float, ...]  # mean difference of each seed
    interval: Interval  # over rows, of the differences averaged over seeds

    @property
    def spread(self) -> float:
        """Standard deviation between seeds (sample formula), nan for one seed."""
        return float(np.std(self.by_seed, ddof=1)) if len(self.by_seed) > 1 else float("nan")

    @property
    def sign(self) -> int:
        """1 or -1 only if the interval and every single seed lie on that side of zero, else 0."""
        sign = self.interval.sign
        return sign if all(value * sign > 0 for value in self.by_seed) else 0


def write_study(
    seeds: Mapping[int, Mapping[str, Path]], output: Path, reference: str, notes: Sequence[str] = ()
) -> Path:
    """Aggregate the evaluations of several seeds into `report.html`, `study.json` and a plot.

    Args:
        seeds: for each seed, the name of each arm and its `evaluation.json` (or the directory holding it).
        output: directory of the page, made if missing.
        reference: the arm that all others are compared with.
        notes: statements of the caller about the study.
    Returns:
        The page.
    Raises:
        InputError: a file is missing or damaged, or seeds and arms were not evaluated on the same rows.
    Communication: none.
    """
    evaluations = {seed: read_evaluations(arms) for seed, arms in seeds.items()}
    _check_same_arms_and_rows(evaluations)
    others = [name for name in next(iter(evaluations.values())) if name != reference]
    pairs = [(arm, reference) for arm in others]
    pairs += [(later, earlier) for earlier, later in combinations(others, 2)]
    found = [difference for pair in pairs for difference in seed_differences(evaluations, *pair)]

    output.mkdir(parents=True, exist_ok=True)
    panels: dict[str, dict[str, Interval]] = {}
    for difference in found:
        label = f"{difference.arm} - {difference.against}"
        panels.setdefault(difference.metric.label, {})[label] = difference.interval
    image = output / "differences.png"
    if panels:
        draw_intervals(panels, image)
    left_out = [f"Seed {seed}, {note}" for seed, arms in evaluations.items() for note in left_out_notes(arms)]
    path = output / "report.html"
    write_page(
        path,
        "study.html",
        facts=evaluation_facts(list(evaluations.values())),
        title="Arms over several seeds",
        subtitle=", ".join([reference, *others]),
        plot=Figure.of(image, "Differences averaged over seeds, 95 % intervals over rows.") if panels else None,
        differences=_table(found, len(evaluations)),
        remarks=[*notes, *left_out, f"{len(evaluations)} seeds: {', '.join(map(str, evaluations))}.", *CAVEATS],
    )
    write_json(output / "study.json", [_plain(difference) for difference in found])
    return path


def seed_differences(
    evaluations: Mapping[int, Mapping[str, Evaluation]], arm: str, against: str
) -> list[SeedDifference]:
    """Compute the differences of two arms for every metric that all seeds have per row.

    Args:
        evaluations: by seed, then by arm, all on the same rows.
        arm, against: the difference is `arm` minus `against`.
    """
    found = []
    for metric in EVALUATION_METRICS:
        key = metric.key
        if any(key not in arms[name].per_row for arms in evaluations.values() for name in (arm, against)):
            continue
        rows = np.stack([arms[arm].per_row[key] - arms[against].per_row[key] for arms in evaluations.values()])
        rows = rows[:, ~np.isnan(rows).any(axis=0)]  # a row may lack a metric: document masking, or left out
        if rows.shape[1] < 2:
            continue
        interval = paired_bootstrap(rows.mean(axis=0), NUM_RESAMPLES)
        found.append(SeedDifference(arm, against, metric, tuple(rows.mean(axis=1).tolist()), interval))
    return found


def _check_same_arms_and_rows(evaluations: Mapping[int, Mapping[str, Evaluation]]) -> None:
    first_seed, first = next(iter(evaluations.items()))
    problems = []
    for seed, arms in evaluations.items():
        if list(arms) != list(first):
            expected = f"the arms of seed {first_seed}: {', '.join(first)}"
            problems.append(Problem(f"seed {seed}", "arms", ", ".join(arms), expected))
            continue
        for name, evaluation in arms.items():
            ours, theirs = evaluation.content["rows"], first[name].content["rows"]
            if ours != theirs:
                problems.append(Problem(str(evaluation.path), "rows", str(ours), f"{theirs}, as other seeds"))
    if problems:
        raise InputError(problems)


def _table(found: Sequence[SeedDifference], num_seeds: int) -> Table:
    rows = [
        [
            f"{difference.arm} - {difference.against}",
            difference.metric.label,
            difference.metric.direction,
            format_interval(difference.interval),
            f"{difference.spread:.4f}",
            f"{min(difference.by_seed):+.4f} … {max(difference.by_seed):+.4f}",
            DIRECTIONS[difference.sign],
        ]
        for difference in found
    ]
    header = ["difference", "metric", "better", "mean and interval", "spread", f"{num_seeds} seeds", "shown"]
    return Table(header, rows, num_text_columns=3)


def _plain(difference: SeedDifference) -> dict[str, object]:
    return {
        "arm": difference.arm,
        "against": difference.against,
        "metric": difference.metric.key,
        "by_seed": list(difference.by_seed),
        "interval": asdict(difference.interval),
        "shown": DIRECTIONS[difference.sign],
    }
