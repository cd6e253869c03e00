"""What `tools/experiment.py` does: check everything, then run the stages. No torch."""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from ebft_mega.apps.experiment.declared.spec_file import SpecFile, read_spec
from ebft_mega.apps.experiment.declared.spec_rules import names_in, spec_problems
from ebft_mega.apps.experiment.declared.split_ledger import ledger_path, record_uses
from ebft_mega.apps.experiment.running.experiment_directory import DATA, EVALUATIONS, experiment_lock, set_aside
from ebft_mega.apps.experiment.running.experiment_runner import ExperimentRunner
from ebft_mega.apps.experiment.running.job_pool import JobPool
from ebft_mega.apps.experiment.running.start_checks import (
    configuration_problems,
    require_own_splits,
    require_unchanged,
    seed_notes,
)
from ebft_mega.apps.experiment.runs.command_lines import CommandLines, ToolCommands
from ebft_mega.apps.experiment.runs.declared_experiment import DeclaredExperiment
from ebft_mega.apps.experiment.runs.split_roles import uses_of
from ebft_mega.apps.experiment.runs.stages import Stage
from ebft_mega.apps.experiment.runs.trial_runs import ExperimentSetup
from ebft_mega.apps.study.commands import thread_environment
from ebft_mega.apps.study.phases import PhaseRunner
from ebft_mega.config.paths import written_path
from ebft_mega.errors import ConfigError, InputError, Problem
from ebft_mega.io.expanded_paths import REPOSITORY
from ebft_mega.io.standard_streams import print_line


@dataclass(frozen=True)
class ExperimentOptions:
    """What the command line asks for."""

    spec: Path
    output: Path | None = None
    jobs: int | None = None
    num_ranks: int = 1
    until: str | None = None
    only: tuple[str, ...] = ()
    is_plan: bool = False
    is_fresh: bool = False
    has_fresh_evaluations: bool = False
    may_reuse_report_split: bool = False
    overrides: tuple[str, ...] = ()
    steps_share: float = 1.0  # of the configured steps of every run
    rows: int | None = None  # of the report split, in place of the file's
    sets_changes_aside: bool = False  # results that were made from something else are no error


def say(text: str) -> None:
    """Print a line."""
    print_line(text.strip(), sys.stdout)


def run_experiment(options: ExperimentOptions, commands: CommandLines | None = None) -> None:
    """Check everything, then run the stages that are asked for.

    Args:
        commands: makes the command lines; None: those of this repository's tools.
    Raises:
        InputProblems: something is wrong; nothing was started.
        JobFailed, PhaseFailed: a command failed.
    """
    setup = read_setup(options)
    experiment = DeclaredExperiment(setup, commands or ToolCommands(), options.only)
    wanted = stages_until(experiment, options.until)
    with experiment_lock(setup.output):
        notes = require_own_splits(setup, options.may_reuse_report_split, reads_documents=False)
        if options.is_fresh:
            set_aside(setup.output, say)
        elif options.has_fresh_evaluations:
            set_aside(setup.output, say, [EVALUATIONS])
        if options.sets_changes_aside and has_changed(experiment):
            set_aside(setup.output, say, but=[DATA])
        require_unchanged(experiment)
        for note in seed_notes(setup):
            say(note)
        runner = make_runner(experiment, options)
        runner.notes = notes
        for stage in wanted:
            runner.run(stage)
            if stage.kind == "prepare":
                require_unchanged(experiment)
                runner.notes = require_own_splits(setup, options.may_reuse_report_split, reads_documents=True)
            record_next_uses(setup, wanted, stage)


def has_changed(experiment: DeclaredExperiment) -> bool:
    """Whether results are there that were made from something else."""
    try:
        require_unchanged(experiment)
    except InputError:
        return True
    return False


def record_next_uses(setup: ExperimentSetup, wanted: list[Stage], done: Stage) -> None:
    """Record what the stage after one uses splits for, before it begins."""
    for following in wanted[wanted.index(done) + 1 :][:1]:
        record_uses(ledger_path(setup.output), uses_of(setup, following.kind))


def read_setup(options: ExperimentOptions) -> ExperimentSetup:
    """Read and check the file and the configurations of all runs.

    Raises:
        InputProblems: everything that is wrong.
    """
    file = read_spec(options.spec, spec_problems)
    if options.output is not None:
        spec = file.spec.model_copy(update={"output_dir": written_path(options.output)})
        file = SpecFile(file.path, spec, file.lines)
    if options.rows is not None:
        evaluation = file.spec.evaluation.model_copy(update={"rows": options.rows})
        file = SpecFile(file.path, file.spec.model_copy(update={"evaluation": evaluation}), file.lines)
    setup = ExperimentSetup(file, options.overrides, options.num_ranks, options.steps_share)
    problems = [*names_in(options.only, setup.spec), *configuration_problems(setup)]
    if problems:
        raise ConfigError(problems)
    return setup


def make_runner(experiment: DeclaredExperiment, options: ExperimentOptions) -> ExperimentRunner:
    """The runner that the options ask for: on a CPU each process has one thread, and the runs share the cores."""
    cores = os.cpu_count() or 1
    jobs, environment = options.jobs or max(1, cores // options.num_ranks), {"OMP_NUM_THREADS": "1"}
    if shutil.which("nvidia-smi"):
        jobs, environment = options.jobs or 1, thread_environment(options.num_ranks)
    pool = JobPool(jobs, say, environment)
    return ExperimentRunner(experiment, pool, PhaseRunner(REPOSITORY, say), say)


def stages_until(experiment: DeclaredExperiment, name: str | None) -> list[Stage]:
    """The stages up to one.

    Raises:
        InputError: there is no such stage.
    """
    names = [stage.name for stage in experiment.stages]
    if name is not None and name not in names:
        raise InputError([Problem("--until", "STAGE", name, f"a stage: {', '.join(names)}")])
    return experiment.stages if name is None else experiment.stages[: names.index(name) + 1]
