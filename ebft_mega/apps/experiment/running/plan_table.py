"""What an experiment will do: its stages and runs, their steps and counted FLOPs, and what is done. No torch."""

from collections.abc import Iterator, Sequence

from ebft_mega.apps.experiment.running.trial_cost import flops_of_run
from ebft_mega.apps.experiment.runs.arm_plans import combinations, main_trials, tuning_trials
from ebft_mega.apps.experiment.runs.declared_experiment import DeclaredExperiment
from ebft_mega.apps.experiment.runs.stages import Stage
from ebft_mega.apps.experiment.runs.trial_runs import (
    ExperimentSetup,
    choice_text,
    start_trial,
    trial_config,
)
from ebft_mega.apps.experiment.trials import Choice, Trial
from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.config.schema import RunConfig
from ebft_mega.cost.cost_table import TERA, aligned
from ebft_mega.errors import InputProblems

HEAD = ("runs", "seeds", "steps", "tokens a run", "TFLOP a run", "TFLOP in all", "done")


def likely_choices(experiment: DeclaredExperiment) -> dict[str, Choice]:
    """The choices that are made, and for other arms the first of the values to try."""
    plans = experiment.setup.plans
    firsts = {name: combinations(plan.tune)[0] for name, plan in plans.items() if plan.tune}
    return firsts | experiment.chosen()


def trials_to_come(experiment: DeclaredExperiment, stage: Stage) -> list[Trial]:
    """The trials of a stage in their order; where a choice is not made yet, with the first of the values to try."""
    spec, plans, chosen = experiment.setup.spec, experiment.setup.plans, likely_choices(experiment)
    make = tuning_trials if stage.kind == "tune" else main_trials
    return [trial for name in stage.arms for trial in make(plans[name], spec, chosen)]


def plan_lines(experiment: DeclaredExperiment) -> Iterator[str]:
    """The plan, line by line. FLOPs are those of steps in which no two rollouts begin alike, without evaluations."""
    setup, total, runs = experiment.setup, 0.0, 0
    yield setup.spec.question
    yield f"results: {setup.output}"
    for stage in experiment.stages:
        yield ""
        yield f"stage {stage.name}"
        if stage.kind == "prepare":
            yield from (f"  {each.makes}: {' '.join(each.run)}" for each in setup.spec.prepare)
        elif stage.kind == "evaluate":
            trials = trials_to_come(experiment, stage)
            of_tuning, of_report = setup.spec.tuning.rows, setup.spec.evaluation.rows
            yield f"  {len(trials)} models on {of_tuning} rows of the tuning split, {of_report} of the report split"
        elif stage.kind in ("tune", "train"):
            table, flops, count = _table(experiment, stage)
            total, runs = total + flops, runs + count
            yield from (f"  {line}" for line in aligned(table))
    yield ""
    yield f"{runs} runs, {total / TERA:,.4g} TFLOP at most: what rollouts begin with alike is computed once"


def _table(experiment: DeclaredExperiment, stage: Stage) -> tuple[list[Sequence[str]], float, int]:
    """The rows of a stage, one for each arm and choice; their FLOPs in all, and the number of runs."""
    setup, chosen = experiment.setup, likely_choices(experiment)
    groups: dict[tuple[str, str], list[Trial]] = {}
    for trial in trials_to_come(experiment, stage):
        groups.setdefault((trial.arm, choice_text(trial.choice)), []).append(trial)
    rows: list[Sequence[str]] = [HEAD]
    total, count = 0.0, 0
    for (arm, choice), trials in groups.items():
        config = trial_config(setup, trials[0], chosen)
        flops = _flops(setup, trials[0], config, chosen)
        is_open = stage.kind == "train" and any(name not in experiment.chosen() for name in setup.plans[arm].chosen_as)
        done = 0 if is_open else sum(experiment.is_trained(trial) for trial in trials)
        texts = ("?", "?") if flops is None else (_tera(flops), _tera(flops * len(trials)))
        rows.append(
            (
                f"{arm} {'(values to be chosen)' if is_open else choice}".rstrip(),
                " ".join(str(trial.seed) for trial in trials),
                f"{config.total_steps:,}",
                f"{config.total_steps * config.tokens_per_step:,}",
                *texts,
                f"{done} of {len(trials)}",
            )
        )
        total, count = total + (flops or 0.0) * len(trials), count + len(trials)
    return rows, total, count


def _tera(flops: float) -> str:
    return f"{flops / TERA:,.4g}"


def _flops(setup: ExperimentSetup, trial: Trial, config: RunConfig, chosen: dict[str, Choice]) -> float | None:
    policy = architecture_of(setup, trial, chosen)
    if policy is None:
        return None
    try:
        features = policy
        if config.ebft.feature_model is not None:
            features = Architecture.from_directory(config.ebft.feature_model)
        return flops_of_run(config, policy, features)
    except InputProblems:  # not made yet
        return None


def architecture_of(setup: ExperimentSetup, trial: Trial, chosen: dict[str, Choice]) -> Architecture | None:
    """The sizes of a trial's model: of its configuration, of the run that it starts from, or of a directory's model.

    Returns:
        None where they are not known yet.
    """
    start = setup.plans[trial.arm].start
    if start is not None and start in setup.plans and setup.plans[start].model is None:
        return architecture_of(setup, start_trial(setup, start, trial.seed, chosen), chosen)
    model = trial_config(setup, trial, chosen).model
    try:
        if model.config is not None:
            return Architecture.from_hf(model.config, "model.config")
        return None if model.init_from is None else Architecture.from_directory(model.init_from)
    except InputProblems:
        return None
