"""What an experiment's file may not say, beyond the kinds of its values. No torch; reads no dataset."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from ebft_mega.apps.experiment.declared.spec_file import SpecFile, path_error, place_of
from ebft_mega.apps.experiment.runs.arm_plans import ArmPlan, arm_plans, lineage, needed_arms
from ebft_mega.apps.experiment.spec import Arm, ExperimentSpec, Preparation
from ebft_mega.config.schema import SECTIONS
from ebft_mega.config.section_values import describe
from ebft_mega.data.store.format import MANIFEST_NAME
from ebft_mega.errors import Problem

SPLITS = ("train", "tuning", "report")
# Keys of a run that follow from keys of the experiment.
_DECIDED = {"output_dir": "output_dir", "seed": "seeds", "model.init_from": "start"}


def spec_problems(file: SpecFile) -> Iterator[Problem]:
    """Everything that is wrong with what the file says, each with its key; `where` is empty."""
    spec = file.spec
    if not spec.arms:
        yield Problem("", "arms", "no arm", "at least one arm")
    unreadable = list(_unexpandable(spec))
    yield from unreadable
    yield from _names(spec)
    yield from _circles(spec)
    for name, arm in spec.arms.items():
        yield from _of_arm(spec, name, arm)
    yield from _of_seeds(spec)
    yield from _of_temperatures(spec)
    yield from _of_comparisons(spec)
    if not unreadable:
        yield from _of_places(spec)


def _arm(spec: ExperimentSpec, key: str, name: str, other: str = "") -> Iterator[Problem]:
    if name not in spec.arms:
        near = difflib.get_close_matches(name, spec.arms, n=1)
        expected = f"an arm: {', '.join(spec.arms)}" + (f"; or {other}" if other else "")
        yield Problem("", key, describe(name), expected, "".join(near))


def _names(spec: ExperimentSpec) -> Iterator[Problem]:
    for name, arm in spec.arms.items():
        if arm.like is not None:
            yield from _arm(spec, f"arms.{name}.like", arm.like)
    for key, comparisons in (("primary", spec.primary), ("secondary", spec.secondary)):
        for number, each in enumerate(comparisons):
            yield from _arm(spec, f"{key}.{number}.arm", each.arm)
            yield from _arm(spec, f"{key}.{number}.against", each.against)
    for front, names in spec.fronts.items():
        for number, name in enumerate(names):
            yield from _arm(spec, f"fronts.{front}.{number}", name)


def _circles(spec: ExperimentSpec) -> Iterator[Problem]:
    """Circles of `like`, and arms whose runs or choices need their own."""
    for name, arm in spec.arms.items():
        if arm.like is not None and lineage(spec.arms, name)[-1] != name:
            last = spec.arms[lineage(spec.arms, name)[-1]].like
            if last == name:
                yield Problem("", f"arms.{name}.like", _way(lineage(spec.arms, name), name), "arms that end somewhere")
        elif arm.like == name:
            yield Problem("", f"arms.{name}.like", f"{name!r}, the arm itself", "another arm")
    plans = arm_plans(spec)
    seen: set[frozenset[str]] = set()
    for name in spec.arms:
        way = _way_back(name, plans)
        if way and frozenset(way) not in seen:
            seen.add(frozenset(way))
            key = "like" if plans[name].start not in way else "start"
            yield Problem("", f"arms.{name}.{key}", _way(way, name), "runs that can be made one after the other")


def _way_back(name: str, plans: Mapping[str, ArmPlan]) -> list[str]:
    """The arms over which an arm needs itself, from it on; none where it does not."""
    ways = [[name]]
    seen = {name}
    while ways:
        way = ways.pop(0)
        for each in needed_arms(plans[way[-1]], plans):
            if each == name:
                return way
            if each not in seen:
                seen.add(each)
                ways.append([*way, each])
    return []


def _way(names: list[str], end: str) -> str:
    return "a circle: " + " -> ".join([*names, end])


def _of_arm(spec: ExperimentSpec, name: str, arm: Arm) -> Iterator[Problem]:
    key = f"arms.{name}"
    if arm.model is not None:
        given = [each for each in ("like", "config", "set", "start", "tune", "seeds") if getattr(arm, each)]
        if given:
            expected = "`model` alone: it is evaluated as it is, and nothing is trained"
            yield Problem("", f"{key}.{given[0]}", f"{', '.join(given)} beside `model`", expected)
    elif arm.like in spec.arms and arm.like is not None and spec.arms[arm.like].model is not None:
        yield Problem("", f"{key}.like", f"{arm.like!r}, a model that is not trained", "an arm that is trained")
    for setting in arm.set:
        yield from _of_setting(f"{key}.set", setting)
    for setting, values in arm.tune.items():
        yield from _of_setting(f"{key}.tune", setting)
        if setting in arm.set:
            yield Problem("", f"{key}.tune.{setting}", "the same key in `set`", "either of the two")
        if len(values) < 2 or len(set(map(repr, values))) < len(values):
            expected = "two values or more, all different"
            yield Problem("", f"{key}.tune.{setting}", f"{len(values)} values: {describe(list(values))}", expected)
    yield from _of_directory(spec, key, arm)
    if (
        not arm.reported
        and not any(name in (each.start, each.like) for each in spec.arms.values())
        and name != spec.start
    ):
        yield Problem("", f"{key}.reported", "false, and nothing starts from this arm", "an arm that is of use")


def _of_directory(spec: ExperimentSpec, key: str, arm: Arm) -> Iterator[Problem]:
    if arm.directory is None:
        return
    seeds = arm.seeds if arm.seeds is not None else spec.seeds
    if len(seeds) != 1 or arm.model is not None:
        yield Problem("", f"{key}.directory", f"{len(seeds)} runs or none", "an arm of one seed that is trained")
    elif path_error(arm.directory) is None and path_error(spec.output_dir) is None:
        place, output = place_of(arm.directory), place_of(spec.output_dir)
        others = [each.directory for each in spec.arms.values() if each is not arm]
        if output not in place.parents or arm.directory in others:
            yield Problem("", f"{key}.directory", describe(arm.directory), "a directory of its own within `output_dir`")


def _of_setting(key: str, setting: str) -> Iterator[Problem]:
    if setting in SECTIONS:
        yield Problem("", f"{key}.{setting}", "a whole section", f"single keys, such as {setting}.{_first(setting)}")
    elif setting in _DECIDED:
        yield Problem("", f"{key}.{setting}", "a key that the experiment itself decides", f"`{_DECIDED[setting]}`")


def _first(section: str) -> str:
    return next(iter(SECTIONS[section].model_fields))


def _of_seeds(spec: ExperimentSpec) -> Iterator[Problem]:
    lists = [("seeds", spec.seeds), ("tuning.seeds", spec.tuning.seeds)]
    lists += [(f"arms.{name}.seeds", arm.seeds) for name, arm in spec.arms.items() if arm.seeds is not None]
    for key, seeds in lists:
        twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
        if twice or not seeds or min(seeds) < 0:
            found = f"{', '.join(map(str, twice))} twice" if twice else describe(list(seeds))
            yield Problem("", key, found, "seeds from 0 on, at least one, each once")


def _of_temperatures(spec: ExperimentSpec) -> Iterator[Problem]:
    chosen = spec.evaluation
    if chosen.equal_temperature not in chosen.temperatures:
        listed = ", ".join(f"{each:g}" for each in chosen.temperatures)
        expected = f"one of evaluation.temperatures: {listed}"
        yield Problem("", "evaluation.equal_temperature", f"{chosen.equal_temperature:g}", expected)
    for key, values in (("temperatures", chosen.temperatures), ("completion_lengths", chosen.completion_lengths)):
        if len(set(values)) < len(values) or (values and min(values) <= 0) or (key == "temperatures" and not values):
            yield Problem("", f"evaluation.{key}", describe(list(values)), "numbers above 0, each once")


def _of_comparisons(spec: ExperimentSpec) -> Iterator[Problem]:
    for key, comparisons in (("primary", spec.primary), ("secondary", spec.secondary)):
        for number, each in enumerate(comparisons):
            place = f"{key}.{number}"
            if each.arm == each.against:
                yield Problem("", f"{place}.against", f"{each.against!r}, the arm itself", "another arm")
            if each in comparisons[:number]:
                yield Problem("", place, "the same comparison a second time", "every comparison once")
            for side in ("arm", "against"):
                name = getattr(each, side)
                if name in spec.arms and not spec.arms[name].reported:
                    yield Problem("", f"{place}.{side}", f"{name!r}, which is not reported", "an arm that is evaluated")


def _paths(spec: ExperimentSpec) -> Iterator[tuple[str, str]]:
    """Keys that hold paths, and names of arms in their place."""
    yield from [("output_dir", spec.output_dir), ("config", spec.config)]
    yield from ((f"splits.{name}", getattr(spec.splits, name)) for name in SPLITS)
    yield from ((f"prepare.{number}.makes", each.makes) for number, each in enumerate(spec.prepare))
    for key, value in (("start", spec.start), ("evaluation.feature_model", spec.evaluation.feature_model)):
        yield from [(key, value)] if value is not None else []
    for name, arm in spec.arms.items():
        for key in ("config", "start", "model"):
            value = getattr(arm, key)
            yield from [(f"arms.{name}.{key}", value)] if value is not None else []


def _unexpandable(spec: ExperimentSpec) -> Iterator[Problem]:
    for key, text in _paths(spec):
        if error := path_error(text):
            yield Problem("", key, error.found, error.expected, error.suggestion)


def _of_places(spec: ExperimentSpec) -> Iterator[Problem]:
    """Files and directories that are not there and that nothing makes."""
    made = [place_of(each.makes) for each in spec.prepare]
    for number, each in enumerate(spec.prepare):
        tool = place_of(each.run[0]) if each.run and path_error(each.run[0]) is None else Path("/")
        if not each.run or not (tool.is_file() and tool.suffix == ".py"):
            found = describe(each.run[0]) if each.run else "nothing"
            yield Problem("", f"prepare.{number}.run", found, "a tool of this repository and its arguments")
        if made.index(made[number]) < number:
            yield Problem("", f"prepare.{number}.makes", "a second command for it", "every directory made once")
    places: dict[Path, str] = {}
    for name in SPLITS:
        text = getattr(spec.splits, name)
        place = place_of(text)
        if place in places:
            expected = f"another dataset than splits.{places[place]}: no text may have two roles"
            yield Problem("", f"splits.{name}", describe(text), expected)
        places[place] = name
        if not (place / MANIFEST_NAME).is_file() and made_by(spec.prepare, place) is None:
            expected = "a dataset directory, or a command of `prepare` that makes it"
            yield Problem("", f"splits.{name}", f"{describe(text)}, where there is no {MANIFEST_NAME}", expected)
    yield from _of_models(spec)
    configs = [("config", spec.config), *((f"arms.{n}.config", a.config) for n, a in spec.arms.items() if a.config)]
    for key, text in configs:
        if not place_of(text).is_file():
            yield Problem("", key, f"{describe(text)}, where there is no file", "a run configuration")


def _of_models(spec: ExperimentSpec) -> Iterator[Problem]:
    named: list[tuple[str, str | None, bool]] = [("start", spec.start, True)]
    named.append(("evaluation.feature_model", spec.evaluation.feature_model, True))
    for name, arm in spec.arms.items():
        named += [(f"arms.{name}.start", arm.start, True), (f"arms.{name}.model", arm.model, False)]
    for key, text, may_be_arm in named:
        if text is None or (may_be_arm and text in spec.arms):
            continue
        place = place_of(text)
        if place.is_dir() or made_by(spec.prepare, place) is not None:
            continue
        if may_be_arm:
            yield from _arm(spec, key, text, "a model directory")
        else:
            yield Problem("", key, f"{describe(text)}, where there is no directory", "a model directory")


def names_in(texts: Iterable[str], spec: ExperimentSpec) -> Iterator[Problem]:
    """A problem for every name that is no arm's, as `--only` takes them."""
    for text in texts:
        yield from (
            Problem("--only", each.key, each.found, each.expected, each.suggestion) for each in _arm(spec, text, text)
        )


def made_by(preparations: Sequence[Preparation], path: Path) -> Preparation | None:
    """The command that makes a path, or a directory that it lies in; None if none does."""
    return next((each for each in preparations if path.is_relative_to(place_of(each.makes))), None)
