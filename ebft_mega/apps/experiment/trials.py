"""The runs of an experiment, and what is known of each once it is done. No torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Choice = tuple[tuple[str, object], ...]  # dotted keys with the values tried or chosen, in the order of the arm's `tune`


@dataclass(frozen=True)
class Trial:
    """One training run, or a model that is evaluated as it is (`seed` None where it has no seed)."""

    arm: str
    choice: Choice
    seed: int | None
    purpose: Literal["tuning", "main"]


@dataclass(frozen=True)
class TrialCost:
    """What a run took."""

    steps: int
    tokens: int  # of text
    flops: float | None  # counted; None where the run has not said
    cpu_seconds: float | None  # of all its processes
    wall_seconds: float | None


@dataclass(frozen=True)
class TrialResult:
    """A trial that is trained and evaluated."""

    trial: Trial
    run: Path | None  # run directory
    tuning: Path | None  # directory of `evaluation.json` on the tuning split
    report: Path | None  # directory of `evaluation.json` on the report split; None for a trial of the tuning
    cost: TrialCost | None


@dataclass(frozen=True)
class ExperimentResults:
    """All that the report is made from."""

    chosen: dict[str, Choice]  # by arm
    trials: tuple[TrialResult, ...]
    facts: dict[str, str]  # code version, data fingerprints, machine, dates
