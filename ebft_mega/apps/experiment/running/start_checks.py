"""What is checked before anything of an experiment starts, and again once its inputs are made. No torch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ebft_mega.apps.experiment.declared.split_ledger import ledger_path, read_ledger, refused_uses, reuse_notes
from ebft_mega.apps.experiment.runs.arm_plans import combinations, main_trials
from ebft_mega.apps.experiment.runs.declared_experiment import DeclaredExperiment
from ebft_mega.apps.experiment.runs.split_roles import (
    ROLES,
    identity_of,
    known_fingerprints,
    role_problems,
    shared_documents,
)
from ebft_mega.apps.experiment.runs.trial_runs import ExperimentSetup, evaluation_config, trial_config
from ebft_mega.apps.experiment.trials import Choice
from ebft_mega.errors import ConfigError, InputError, Problem
from ebft_mega.lifecycle.findings import PREVIOUS


def configuration_problems(setup: ExperimentSetup) -> list[Problem]:
    """What the run configurations of all trials refuse, each once."""
    found: dict[str, Problem] = {}
    try:
        evaluation_config(setup)
    except ConfigError as error:
        found |= {str(each): each for each in error.problems}
    firsts: dict[str, Choice] = {name: combinations(plan.tune)[0] for name, plan in setup.plans.items() if plan.tune}
    for name, plan in setup.plans.items():
        for choice in combinations(plan.tune) if plan.model is None else ():
            trial = main_trials(plan, setup.spec, {**firsts, name: choice})[0]
            try:
                trial_config(setup, trial, firsts)
            except ConfigError as error:
                # What the experiment's own configuration refuses is said once.
                new = {str(each): _placed(setup, name, each) for each in error.problems}
                found |= {text: problem for text, problem in new.items() if text not in found}
    return list(found.values())


def _placed(setup: ExperimentSetup, arm: str, problem: Problem) -> Problem:
    """A problem of a configuration, with the line of the experiment that sets its key."""
    for holder in ("set", "tune"):
        key = f"arms.{arm}.{holder}.{problem.key}"
        if key in setup.file.lines:
            return replace(problem, where=setup.file.place(key))
    return problem.within(f"{setup.file.place(f'arms.{arm}')}: arms.{arm}")


def require_unchanged(experiment: DeclaredExperiment) -> None:
    """Refuse a grid of which some results were made from something else.

    Raises:
        InputError: which, and what has changed.
    """
    problems = experiment.changes()
    if not problems:
        return
    setup = experiment.setup
    option, what = "--fresh", str(setup.output)
    if concerns_evaluations_alone(problems):
        option, what = "--fresh-evaluations", f"the evaluations of {setup.output}"
    found = f"{setup.output} with results that were made from something else"
    expected = f"what they were made from, or {option}, which sets {what} aside in {PREVIOUS}/"
    raise InputError([*problems, Problem(str(setup.file.path), "output_dir", found, expected)])


def concerns_evaluations_alone(changes: Sequence[Problem]) -> bool:
    """Whether only results of evaluations were made from something else."""
    return all(problem.where.startswith("evaluate ") for problem in changes)


def require_own_splits(setup: ExperimentSetup, may_reuse: bool, reads_documents: bool) -> Mapping[str, str]:
    """Refuse texts with two roles, and a report split that was used before.

    Args:
        may_reuse: a split that was reported on before may be used knowingly.
        reads_documents: whether the splits' documents are compared, too.
    Returns:
        Notes for the report, by name.
    Raises:
        InputError: everything that is wrong with the splits that are there.
    """
    problems = list(role_problems(setup))
    if reads_documents:  # everything is made
        lacking = [role for role in ROLES if role not in known_fingerprints(setup)]
        found = "{!r}, which is not there and which no preparation has made"
        problems += [
            Problem("", f"splits.{role}", found.format(getattr(setup.spec.splits, role)), "a dataset directory")
            for role in lacking
        ]
    if reads_documents and not problems:
        problems += shared_documents(setup)
    notes: Mapping[str, str] = {}
    report = known_fingerprints(setup).get("report")
    if report is not None:
        ledger, spec = read_ledger(ledger_path(setup.output)), identity_of(setup)
        problems += refused_uses(ledger, report, spec, may_reuse)
        notes = reuse_notes(ledger, report, spec)
    if problems:
        raise InputError([replace(each, where=each.where or setup.file.place(each.key)) for each in problems])
    return notes


def seed_notes(setup: ExperimentSetup) -> Iterator[str]:
    """What a person should know of the seeds."""
    main = {seed for plan in setup.plans.values() if plan.model is None for seed in plan.seeds}
    both = sorted(main & set(setup.spec.tuning.seeds))
    if both and any(plan.tune for plan in setup.plans.values()):
        yield (
            f"note: {', '.join(map(str, both))} are seeds of the tuning and of the main runs: "
            "the values that are reported with them were chosen with them"
        )
