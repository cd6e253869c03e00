"""Gather what an experiment's report is made from: trials, what they took, what they were made with. No torch."""

import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from ebft_mega.apps.experiment.running.trial_cost import trial_cost
from ebft_mega.apps.experiment.runs.declared_experiment import DeclaredExperiment
from ebft_mega.apps.experiment.runs.fingerprints import data_fingerprint, evaluation_code, training_code
from ebft_mega.apps.experiment.runs.jobs import evaluation_job, training_job
from ebft_mega.apps.experiment.runs.trial_runs import ExperimentSetup, Split, split_place, trial_config
from ebft_mega.apps.experiment.trials import Choice, ExperimentResults, Trial, TrialResult
from ebft_mega.runtime.run_files import describe_environment

_SPLITS: tuple[Split, ...] = ("tuning", "report")


def gather(experiment: DeclaredExperiment) -> ExperimentResults:
    """All trials whose choices are made, with what is done of each."""
    chosen = experiment.chosen()
    found: dict[Trial, TrialResult] = {}
    for stage in experiment.stages:
        for trial in experiment.known_trials(stage):
            if trial not in found:
                found[trial] = _result(experiment, trial, chosen)
    return ExperimentResults(dict(chosen), tuple(found.values()), facts(experiment.setup))


def _result(experiment: DeclaredExperiment, trial: Trial, chosen: Mapping[str, Choice]) -> TrialResult:
    setup, commands = experiment.setup, experiment.commands
    run = cost = None
    if setup.plans[trial.arm].model is None:
        job = training_job(setup, trial, chosen, commands)
        if job.is_done():
            run, config = job.output, trial_config(setup, trial, chosen)
            cost = trial_cost(run, config, config.ebft.feature_model or config.model.init_from)
    places: dict[str, Path | None] = {}
    for split in _SPLITS[: 2 if trial.purpose == "main" else 1]:
        job = evaluation_job(setup, trial, split, chosen, commands)
        places[split] = job.output if job.is_done() else None
    return TrialResult(trial, run, places["tuning"], places.get("report"), cost)


def facts(setup: ExperimentSetup) -> dict[str, str]:
    """What an experiment is made with, in words: code, machine, datasets, date."""
    environment = describe_environment()
    found = {
        "code": str(environment["git_revision"] or environment["ebft_mega"]),
        "sources of training": training_code()[:16],
        "sources of evaluation": evaluation_code()[:16],
        "machine": f"{platform.node()}, {os.cpu_count()} cores, {platform.platform()}",
        "processes of a run": str(setup.num_ranks),
        "written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }
    for split in ("train", "tuning", "report"):
        mark = data_fingerprint(split_place(setup, split))
        found[f"{split} split"] = f"{getattr(setup.spec.splits, split)}, {(mark or 'not there')[:16]}"
    if setup.overrides:
        found["set for every run"] = " ".join(setup.overrides)
    return found
