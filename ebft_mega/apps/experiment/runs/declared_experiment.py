"""An experiment and how far it is: its stages, the jobs of each, what was chosen, what has changed since. No torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ebft_mega.apps.experiment.choosing import choose
from ebft_mega.apps.experiment.runs.arm_plans import main_trials, tuning_trials
from ebft_mega.apps.experiment.runs.command_lines import CommandLines
from ebft_mega.apps.experiment.runs.job_inputs import FOLLOWING
from ebft_mega.apps.experiment.runs.jobs import Chain, Job, evaluation_job, training_job
from ebft_mega.apps.experiment.runs.stages import Stage, stages_of
from ebft_mega.apps.experiment.runs.stamps import differences, read_stamp
from ebft_mega.apps.experiment.runs.trial_runs import ExperimentSetup, trial_text
from ebft_mega.apps.experiment.trials import Choice, ExperimentResults, Trial, TrialResult
from ebft_mega.errors import Problem

GRID = ("tune", "train", "evaluate")  # kinds of stages that have trials


@dataclass
class DeclaredExperiment:
    """An experiment and what is there of it.

    Args:
        commands: makes the command lines.
        only: arms to run, with what they need; empty: all.
    """

    setup: ExperimentSetup
    commands: CommandLines
    only: tuple[str, ...] = ()
    _chosen: dict[str, Choice] = field(default_factory=dict)

    @property
    def stages(self) -> list[Stage]:
        """All stages, in order."""
        return stages_of(self.setup.plans, self.only)

    def chains(self, stage: Stage) -> list[Chain]:
        """The jobs of a stage, by trial."""
        chosen = self.chosen()
        found = []
        for trial in self.trials(stage, chosen):
            jobs: list[Job] = []
            if stage.kind in ("tune", "train"):
                jobs.append(training_job(self.setup, trial, chosen, self.commands))
            if stage.kind in ("tune", "evaluate"):
                jobs.append(evaluation_job(self.setup, trial, "tuning", chosen, self.commands))
            if stage.kind == "evaluate":
                jobs.append(evaluation_job(self.setup, trial, "report", chosen, self.commands))
            found.append(Chain(trial_text(trial), tuple(jobs)))
        return found

    def training_chains(self, stage: Stage) -> list[Chain]:
        """The training runs of a stage, each by itself."""
        chosen = self.chosen()
        jobs = [training_job(self.setup, trial, chosen, self.commands) for trial in self.trials(stage, chosen)]
        return [Chain(job.name.removeprefix("train "), (job,)) for job in jobs]

    def is_trained(self, trial: Trial) -> bool:
        """Whether a trial's run is done."""
        return training_job(self.setup, trial, self.chosen(), self.commands).is_done()

    def trials(self, stage: Stage, chosen: Mapping[str, Choice]) -> list[Trial]:
        """The trials of a stage.

        Args:
            chosen: must hold the choices that they need.
        """
        spec, plans = self.setup.spec, self.setup.plans
        make = tuning_trials if stage.kind == "tune" else main_trials
        return [trial for name in stage.arms for trial in make(plans[name], spec, chosen)]

    def chosen(self) -> dict[str, Choice]:
        """The choices of all arms whose tuning is done."""
        for stage in self.stages:
            if stage.kind != "tune":
                continue
            for name in stage.arms:
                if name not in self._chosen:
                    results = self._tuned(name)
                    if results is None:
                        return self._chosen
                    self._chosen |= choose(self.setup.spec, results)
        return self._chosen

    def _tuned(self, name: str) -> ExperimentResults | None:
        """The trials of an arm's tuning; None if they are not all done."""
        trials = tuning_trials(self.setup.plans[name], self.setup.spec, self._chosen)
        results = []
        for trial in trials:
            job = evaluation_job(self.setup, trial, "tuning", self._chosen, self.commands)
            if not job.is_done():
                return None
            results.append(TrialResult(trial, None, job.output, None, None))
        return ExperimentResults({}, tuple(results), {})

    def known_trials(self, stage: Stage) -> Iterator[Trial]:
        """The trials of a stage as far as the choices that they need are made."""
        chosen = self.chosen()
        for name in stage.arms if stage.kind in GRID else ():
            try:
                yield from self.trials(Stage(stage.name, stage.kind, (name,)), chosen)
            except KeyError:
                continue

    def changes(self) -> list[Problem]:
        """What results that are there were not made from, and would be now; only where it begins, not what follows."""
        problems: list[Problem] = []
        chosen = self.chosen()
        seen: set[Path] = set()
        for stage in self.stages:
            for trial in self.known_trials(stage):
                for job in self._jobs_of(stage, trial, chosen):
                    if job.output not in seen:
                        seen.add(job.output)
                        problems += changes_of(job)
        roots = [problem for problem in problems if problem.key not in FOLLOWING]
        return roots or problems

    def _jobs_of(self, stage: Stage, trial: Trial, chosen: Mapping[str, Choice]) -> Iterator[Job]:
        make = partial(evaluation_job, self.setup, trial, chosen=chosen, commands=self.commands)
        if self.setup.plans[trial.arm].model is None:
            yield training_job(self.setup, trial, chosen, self.commands)
        if trial.purpose == "tuning" or stage.kind == "evaluate":
            yield make("tuning")
        if stage.kind == "evaluate":
            yield make("report")


def changes_of(job: Job) -> Iterator[Problem]:
    """What a job's result that is there was not made from, and would be now."""
    stamp = read_stamp(job.output)
    if stamp is not None:
        yield from differences(job.name, stamp.inputs, job.inputs)
