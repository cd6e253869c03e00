"""No text may have two roles in an experiment: that is trained on, chosen on, reported on. No torch."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from ebft_mega.apps.experiment.declared.spec_file import place_of
from ebft_mega.apps.experiment.declared.split_ledger import Role, SplitUse, identity, use_now
from ebft_mega.apps.experiment.runs.arm_plans import combinations, main_trials
from ebft_mega.apps.experiment.runs.fingerprints import data_fingerprint
from ebft_mega.apps.experiment.runs.trial_runs import ExperimentSetup, split_place, trial_config
from ebft_mega.config.paths import written_path
from ebft_mega.config.schema import RunConfig
from ebft_mega.data.store.checks import read_manifest
from ebft_mega.data.store.opening import open_dataset
from ebft_mega.errors import Problem

ROLES: tuple[Role, ...] = ("train", "tuning", "report")
HELD_OUT: tuple[Role, ...] = ("tuning", "report")
LEAST_TOKENS = 32  # shorter documents may be equal without being quoted
MOST_BYTES = 2**28  # of the shards of all splits, beyond which documents are not compared


def known_fingerprints(setup: ExperimentSetup) -> dict[Role, str]:
    """Fingerprints of the splits that are there, by role.

    Raises:
        InputError: a split is damaged.
    """
    found = {role: data_fingerprint(split_place(setup, role)) for role in ROLES}
    return {role: mark for role, mark in found.items() if mark is not None}


def identity_of(setup: ExperimentSetup) -> str:
    """What decides an experiment's figures, as the ledger knows it."""
    rehearsal = [f"steps={setup.steps_share}"] * (setup.steps_share != 1)
    return identity(setup.spec, [*setup.overrides, *rehearsal])


def own_configs(setup: ExperimentSetup) -> dict[str, RunConfig]:
    """The run configuration of every arm that is trained, with the first of the values to try."""
    firsts = {name: combinations(plan.tune)[0] for name, plan in setup.plans.items() if plan.tune}
    trained = {name: plan for name, plan in setup.plans.items() if plan.model is None}
    return {
        name: trial_config(setup, main_trials(plan, setup.spec, firsts)[0], firsts) for name, plan in trained.items()
    }


def role_problems(setup: ExperimentSetup) -> Iterator[Problem]:
    """Where a split has two roles, in the splits themselves or in what arms train and look at; `where` is empty.

    Raises:
        InputError: a split is damaged.
    """
    marks = known_fingerprints(setup)
    for number, role in enumerate(ROLES):
        for other in ROLES[:number]:
            if role in marks and marks.get(other) == marks[role]:
                found = f"{getattr(setup.spec.splits, role)!r}, with the contents of splits.{other}"
                yield Problem("", f"splits.{role}", found, "other texts: none may have two roles")
    held_out = {role: split_place(setup, role) for role in HELD_OUT}
    for name, config in own_configs(setup).items():
        for source in config.data.named_sources.values():
            for role, place in held_out.items():
                if _is_same(source.shards, place, marks.get(role)):
                    found = f"{str(source.shards)!r} to train on, which is splits.{role}"
                    yield Problem("", f"arms.{name}", found, "other texts: none may have two roles")
        watched = config.evaluation.shards
        if watched is not None and _is_same(watched, held_out["report"], marks.get("report")):
            found = f"evaluation.shards {str(watched)!r}, which is splits.report"
            yield Problem("", f"arms.{name}", found, "the tuning split, or none: the report split is looked at once")


def _is_same(shards: Path | str, place: Path, mark: str | None) -> bool:
    if isinstance(shards, str):
        return False
    return shards.resolve() == place.resolve() or (mark is not None and data_fingerprint(shards) == mark)


def shared_documents(setup: ExperimentSetup) -> Iterator[Problem]:
    """Documents that lie in two splits, where these are small enough to be read; `where` is empty.

    Raises:
        InputError, DamagedDataError: a split is damaged.
    """
    places = {role: split_place(setup, role) for role in known_fingerprints(setup)}
    size = sum(shard.bytes for place in places.values() for shard in read_manifest(place).shards)
    if size > MOST_BYTES:
        return
    texts = {role: _documents(place) for role, place in places.items()}
    for number, role in enumerate(ROLES):
        for other in ROLES[:number]:
            both = sorted(texts.get(role, {}).keys() & texts.get(other, {}).keys())
            if both:
                here, there = texts[role][both[0]], texts[other][both[0]]
                found = f"{len(both)} documents of splits.{other}, such as number {here} ({there} there)"
                yield Problem("", f"splits.{role}", found, "other texts: none may have two roles")


def _documents(place: Path) -> Mapping[bytes, int]:
    """The number of each document of a dataset that is not short, by the hash of its tokens."""
    dataset = open_dataset(place)
    try:
        numbers = (number for number, tokens in enumerate(dataset.index["tokens"]) if tokens >= LEAST_TOKENS)
        return {hashlib.sha256(dataset.tokens(number).tobytes()).digest(): number for number in numbers}
    finally:
        dataset.close()


def uses_of(setup: ExperimentSetup, kind: str) -> list[SplitUse]:
    """The uses of splits that a stage begins, as far as they are there.

    Args:
        kind: of the stage.
    """
    marks = known_fingerprints(setup)
    experiment, spec = written_path(setup.output), identity_of(setup)

    def use(role: Role, mark: str, place: Path) -> SplitUse:
        return use_now(mark, role, experiment, spec, written_path(place))

    if kind == "evaluate":
        return [use(role, marks[role], split_place(setup, role)) for role in HELD_OUT if role in marks]
    if kind not in ("tune", "train"):
        return []
    found = [use("tuning", marks["tuning"], split_place(setup, "tuning"))] if "tuning" in marks else []
    for config in own_configs(setup).values():
        for source in config.data.named_sources.values():
            mark = None if isinstance(source.shards, str) else data_fingerprint(source.shards)
            if mark is not None:
                found.append(use("train", mark, place_of(str(source.shards))))
    return list({(each.fingerprint, each.role): each for each in found}.values())
