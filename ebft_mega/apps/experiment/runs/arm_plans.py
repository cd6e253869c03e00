"""The runs that an experiment asks for: arms with what they take over from others, and their trials. No torch."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ebft_mega.apps.experiment.spec import Arm, ExperimentSpec
from ebft_mega.apps.experiment.trials import Choice, Trial


@dataclass(frozen=True)
class ArmPlan:
    """An arm with everything that it takes over from the arm that it is like."""

    name: str
    config: str  # path of the run configuration
    settings: Mapping[str, Any]  # of its own and of the arms that it is like, by dotted key
    start: str | None  # an arm or a model directory; None: as the run configuration says
    model: str | None  # a model that is evaluated as it is
    tune: Mapping[str, tuple[Any, ...]]  # values that this arm itself is tried with
    chosen_as: tuple[str, ...]  # arms whose choices hold here, the nearest first
    seeds: tuple[int, ...]
    reported: bool


def lineage(arms: Mapping[str, Arm], name: str) -> list[str]:
    """An arm and those that it is like, the nearest first; each once, also where they go in a circle."""
    found: list[str] = []
    next_name: str | None = name
    while next_name is not None and next_name in arms and next_name not in found:
        found.append(next_name)
        next_name = arms[next_name].like
    return found


def arm_plans(spec: ExperimentSpec) -> dict[str, ArmPlan]:
    """Every arm as it is run. The experiment's start is that of all arms that are not part of what leads to it."""
    before_start = set(_leading_to(spec, spec.start)) if spec.start in spec.arms else set()
    return {name: _plan(spec, name, before_start) for name in spec.arms}


def _leading_to(spec: ExperimentSpec, name: str | None) -> Iterator[str]:
    """An arm, and what its own `start` and that of the arms that it is like lead to."""
    seen: set[str] = set()
    while name in spec.arms and name not in seen:
        assert name is not None
        seen.add(name)
        yield name
        own = (spec.arms[each].start for each in lineage(spec.arms, name))
        name = next((start for start in own if start is not None), None)


def _plan(spec: ExperimentSpec, name: str, before_start: set[str]) -> ArmPlan:
    arm, line = spec.arms[name], lineage(spec.arms, name)
    ancestors = [spec.arms[each] for each in line]
    settings: dict[str, Any] = {}
    for each in reversed(ancestors):
        # A key that is tried or chosen takes the place of a set one, and a set one that of a tried one.
        settings = {key: value for key, value in settings.items() if key not in each.tune} | each.set
    start = next((each.start for each in ancestors if each.start is not None), None)
    if start is None and name not in before_start and arm.model is None:
        start = spec.start
    return ArmPlan(
        name=name,
        config=next((each.config for each in ancestors if each.config is not None), spec.config),
        settings=settings,
        start=start,
        model=arm.model,
        tune=arm.tune,
        chosen_as=tuple(each for each in line if spec.arms[each].tune),
        seeds=arm.seeds if arm.seeds is not None else spec.seeds,
        reported=arm.reported,
    )


def combinations(tune: Mapping[str, Sequence[Any]]) -> list[Choice]:
    """Every combination of the values to try, the last key changing fastest."""
    return [tuple(zip(tune, values, strict=True)) for values in itertools.product(*tune.values())]


def choice_of(plan: ArmPlan, spec: ExperimentSpec, chosen: Mapping[str, Choice]) -> Choice:
    """The values that an arm's main runs take: its own choice, and those of the arms that it is like.

    Args:
        chosen: of every arm that has values to try.
    Raises:
        KeyError: the choice of one of them is not known.
    """
    values: dict[str, Any] = {}
    for name in reversed(lineage(spec.arms, plan.name)):
        arm = spec.arms[name]
        values = {key: value for key, value in values.items() if key not in arm.set}
        values |= dict(chosen[name]) if arm.tune else {}
    return tuple(values.items())


def tuning_trials(plan: ArmPlan, spec: ExperimentSpec, chosen: Mapping[str, Choice]) -> list[Trial]:
    """The runs among which an arm's values are chosen; none where it has nothing to try.

    Args:
        chosen: of the arms that it is like; their values hold during its own tuning, too.
    """
    if not plan.tune:
        return []
    inherited = choice_of(plan, spec, {**chosen, plan.name: ()})
    of_others = tuple((key, value) for key, value in inherited if key not in plan.tune)
    return [
        Trial(plan.name, of_others + choice, seed, "tuning")
        for choice in combinations(plan.tune)
        for seed in spec.tuning.seeds
    ]


def main_trials(plan: ArmPlan, spec: ExperimentSpec, chosen: Mapping[str, Choice]) -> list[Trial]:
    """An arm's runs with the values chosen for it, one for each seed; of a model that is not trained one without."""
    if plan.model is not None:
        return [Trial(plan.name, (), None, "main")]
    choice = choice_of(plan, spec, chosen)
    return [Trial(plan.name, choice, seed, "main") for seed in plan.seeds]


def levels(plans: Mapping[str, ArmPlan]) -> list[list[str]]:
    """The arms in the order in which they can be run: tuning and main runs of each level after those of the one before.

    What no other level needs is in the last one.
    """
    depth: dict[str, int] = {}

    def of(name: str) -> int:
        if name not in depth:
            depth[name] = 0  # also ends circles
            of_starts = [of(each) + 1 for each in _starts(plans[name], plans)]
            # A level's choices are made before its main runs, and after its tuning.
            of_choices = [of(each) + bool(plans[name].tune) for each in _choices(plans[name])]
            depth[name] = max([*of_starts, *of_choices], default=0)
        return depth[name]

    last = max(map(of, plans), default=0)
    needed: set[str] = set()
    waiting = [each for plan in plans.values() for each in (*_starts(plan, plans), *_choices(plan) * bool(plan.tune))]
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            waiting += _choices(plans[name])
    place = {name: of(name) if name in needed else last for name in plans}
    return [found for number in range(last + 1) if (found := [name for name in plans if place[name] == number])]


def _starts(plan: ArmPlan, plans: Mapping[str, ArmPlan]) -> list[str]:
    return [plan.start] if plan.start is not None and plan.start in plans else []


def _choices(plan: ArmPlan) -> list[str]:
    """Other arms whose choices hold for an arm."""
    return [name for name in plan.chosen_as if name != plan.name]


def needed_arms(plan: ArmPlan, plans: Mapping[str, ArmPlan]) -> list[str]:
    """The arms without which an arm cannot be run: that it starts from, and those whose choices it takes."""
    return [*_starts(plan, plans), *_choices(plan)]


def closure(names: Sequence[str], plans: Mapping[str, ArmPlan]) -> set[str]:
    """Arms, and all that have to be run before them."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += needed_arms(plans[name], plans)
    return found


def start_seed(start: ArmPlan, seed: int | None) -> int | None:
    """The seed of the run of another arm that a run starts from: the same, or else that arm's first."""
    if start.model is not None:
        return None
    return seed if seed in start.seeds else start.seeds[0]
