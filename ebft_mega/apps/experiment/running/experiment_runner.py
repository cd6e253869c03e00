"""Run the stages of an experiment; each resumes where it stopped. No torch."""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from ebft_mega.apps.experiment.running.commands import thread_environment
from ebft_mega.apps.experiment.running.gathered_results import gather
from ebft_mega.apps.experiment.running.job_pool import JobPool
from ebft_mega.apps.experiment.running.phases import PhaseRunner
from ebft_mega.apps.experiment.running.preparing import prepare
from ebft_mega.apps.experiment.running.results_file import write_results
from ebft_mega.apps.experiment.runs.declared_experiment import DeclaredExperiment
from ebft_mega.apps.experiment.runs.evaluation_batches import evaluation_batches
from ebft_mega.apps.experiment.runs.stages import Stage
from ebft_mega.apps.experiment.runs.trial_runs import Split, trial_text
from ebft_mega.errors import InputError, Problem
from ebft_mega.io.expanded_paths import REPOSITORY


@dataclass
class ExperimentRunner:
    """Run the stages of an experiment.

    Args:
        pool: trains; evaluators: evaluates; phases: runs the commands of the preparation.
        notes: for the report, by name.
    """

    experiment: DeclaredExperiment
    pool: JobPool
    evaluators: JobPool
    phases: PhaseRunner
    say: Callable[[str], None]
    notes: Mapping[str, str] = field(default_factory=dict)

    def run(self, stage: Stage) -> None:
        """Run what is not done yet of a stage.

        Raises:
            JobFailed, PhaseFailed: a command failed.
            InputError: what an earlier stage should have made is not there.
        """
        if stage.kind == "prepare":
            prepare(self.experiment.setup.spec.prepare, self.phases)
        elif stage.kind == "report":
            self.report()
        else:
            self.run_trials(stage)
            self.show_choices(stage)

    def run_trials(self, stage: Stage) -> None:
        """Train what a stage trains, then evaluate what it evaluates, several models in one process."""
        experiment = self.experiment
        if stage.kind != "evaluate":
            chains = experiment.training_chains(stage)
            self.say(f"== {stage.name}: {len(chains)} {'run' if len(chains) == 1 else 'runs'}")
            self.pool.run(chains)
        splits: dict[str, tuple[Split, ...]] = {"tune": ("tuning",), "evaluate": ("tuning", "report")}
        chosen = experiment.chosen()
        trials = experiment.trials(stage, chosen)
        for split in splits.get(stage.kind, ()):
            self.say(f"== {stage.name}: {len(trials)} {'model' if len(trials) == 1 else 'models'} on the {split} split")
            arguments = (experiment.setup, trials, split, chosen, experiment.commands, self.evaluators.jobs)
            self.evaluators.run(evaluation_batches(*arguments))

    def show_choices(self, stage: Stage) -> None:
        """Say what was chosen in a stage of tuning."""
        chosen = self.experiment.chosen()
        for name in stage.arms if stage.kind == "tune" else ():
            values = " ".join(f"{key}={value}" for key, value in chosen[name])
            self.say(f"chosen for {name} on the tuning split: {values}")

    def report(self) -> None:
        """Write `results.json` and the report.

        Raises:
            InputError: an arm is not evaluated yet.
        """
        setup = self.experiment.setup
        results = gather(self.experiment)
        results = replace(results, facts={**results.facts, **self.notes})
        lacking = [
            Problem("report", trial_text(each.trial), "no evaluation on the report split", "the stage evaluate")
            for each in results.trials
            if each.trial.purpose == "main" and setup.plans[each.trial.arm].reported and each.report is None
        ]
        if lacking and self.experiment.only:
            self.say("not all arms are evaluated on the report split: there is no report yet")
            return
        if lacking:
            raise InputError(lacking)
        path = write_results(setup.output, results)
        self.say(f"results: {path}")
        # Draws plots, which --help should not wait for.
        from ebft_mega.apps.experiment.experiment_report import write_report

        self.say(f"report: {write_report(setup.spec, results, setup.output)}")


def make_runner(
    experiment: DeclaredExperiment, say: Callable[[str], None], jobs: int | None, num_ranks: int
) -> ExperimentRunner:
    """A runner: on a CPU each process has one thread, and the runs share the cores.

    A model is evaluated by one process, so that on a CPU as many are evaluated at a time as runs have processes.

    Args:
        jobs: runs at a time; None: as many as the cores have room for, or one where there is a GPU.
        num_ranks: processes of a run.
    """
    cores = os.cpu_count() or 1
    at_a_time, environment = jobs or max(1, cores // num_ranks), {"OMP_NUM_THREADS": "1"}
    evaluators = at_a_time * num_ranks
    if shutil.which("nvidia-smi"):
        at_a_time, environment = jobs or 1, thread_environment(num_ranks)
        evaluators = at_a_time
    pools = JobPool(at_a_time, say, environment), JobPool(evaluators, say, environment)
    return ExperimentRunner(experiment, *pools, PhaseRunner(REPOSITORY, say), say)
