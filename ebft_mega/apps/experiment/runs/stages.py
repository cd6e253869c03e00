"""The stages of an experiment, in order: prepare, tune, train, evaluate, report. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ebft_mega.apps.experiment.runs.arm_plans import ArmPlan, closure, levels

PREPARE, EVALUATE, REPORT = "prepare", "evaluate", "report"


@dataclass(frozen=True)
class Stage:
    """One stage."""

    name: str
    kind: Literal["prepare", "tune", "train", "evaluate", "report"]
    arms: tuple[str, ...] = ()


def stages_of(plans: Mapping[str, ArmPlan], only: Sequence[str] = ()) -> list[Stage]:
    """The stages of an experiment, in order; arms that others need are tuned and trained before these.

    Args:
        only: arms to run, with what they need; empty: all.
    """
    wanted = closure(only or list(plans), plans)
    groups = [names for each in levels(plans) if (names := tuple(name for name in each if name in wanted))]
    found = [Stage(PREPARE, "prepare")]
    for number, names in enumerate(groups, start=1):
        suffix = f"-{number}" if number < len(groups) else ""
        tuned = tuple(name for name in names if plans[name].tune)
        trained = tuple(name for name in names if plans[name].model is None)
        found += [Stage(f"tune{suffix}", "tune", tuned)] if tuned else []
        found += [Stage(f"train{suffix}", "train", trained)] if trained else []
    reported = tuple(name for name in plans if name in (only or plans) and plans[name].reported)
    return [*found, Stage(EVALUATE, "evaluate", reported), Stage(REPORT, "report")]
