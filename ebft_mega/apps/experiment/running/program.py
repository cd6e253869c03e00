"""What `tools/experiment.py` does: check everything, then run the stages. No torch."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from ebft_mega.apps.experiment.declared.spec_file import SpecFile, read_spec
from ebft_mega.apps.experiment.declared.spec_rules import names_in, spec_problems
from ebft_mega.apps.experiment.declared.split_ledger import ledger_path, record_uses
from ebft_mega.apps.experiment.running.experiment_directory import DATA, EVALUATIONS, experiment_lock, set_aside
from ebft_mega.apps.experiment.running.experiment_runner import make_runner
from ebft_mega.apps.experiment.running.phases import PhaseRunner
from ebft_mega.apps.experiment.running.plan_table import plan_lines
from ebft_mega.apps.experiment.running.slurm_arrays import write_arrays
from ebft_mega.apps.experiment.running.start_checks import (
    concerns_evaluations_alone,
    configuration_problems,
    require_own_splits,
    require_unchanged,
    seed_notes,
)
from ebft_mega.apps.experiment.runs.command_lines import CommandLines, ToolCommands
from ebft_mega.apps.experiment.runs.declared_experiment import DeclaredExperiment, changes_of
from ebft_mega.apps.experiment.runs.split_roles import uses_of
from ebft_mega.apps.experiment.runs.stages import Stage
from ebft_mega.apps.experiment.runs.trial_runs import ExperimentSetup
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
    stage: str | None = None  # with `task`: run one trial of one stage
    task: int | None = None
    sbatch_options: tuple[str, ...] | None = None  # None: run here
    submits: bool = False


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
    if options.is_plan:
        for line in plan_lines(experiment):
            print_line(line, sys.stdout)
        return
    if options.stage is not None:
        run_task(experiment, options)
        return
    with experiment_lock(setup.output):
        notes = require_own_splits(setup, options.may_reuse_report_split, reads_documents=False)
        if options.is_fresh:
            set_aside(setup.output, say, but=[DATA])
        elif options.has_fresh_evaluations:
            set_aside(setup.output, say, [EVALUATIONS])
        if options.sets_changes_aside and (changes := experiment.changes()):
            if concerns_evaluations_alone(changes):
                set_aside(setup.output, say, [EVALUATIONS])
            else:
                set_aside(setup.output, say, but=[DATA])
        require_unchanged(experiment)
        for note in seed_notes(setup):
            say(note)
        if options.sbatch_options is not None:
            submit_arrays(experiment, wanted, options)
            return
        runner = make_runner(experiment, say, options.jobs, options.num_ranks)
        runner.notes = notes
        for stage in wanted:
            runner.run(stage)
            if stage.kind == "prepare":
                require_unchanged(experiment)
                runner.notes = require_own_splits(setup, options.may_reuse_report_split, reads_documents=True)
            record_next_uses(setup, wanted, stage)


def run_task(experiment: DeclaredExperiment, options: ExperimentOptions) -> None:
    """Run one trial of a stage, as a task of a Slurm array does; others may run at the same time.

    Raises:
        InputProblems: something is wrong; nothing was started.
        JobFailed, PhaseFailed: a command failed.
    """
    setup = experiment.setup
    stage = stages_until(experiment, options.stage)[-1]
    notes = require_own_splits(setup, options.may_reuse_report_split, reads_documents=stage.kind == "report")
    runner = make_runner(experiment, say, 1, options.num_ranks)
    runner.notes = notes
    if not stage.arms:
        runner.run(stage)
        if stage.kind == "prepare":
            require_own_splits(setup, options.may_reuse_report_split, reads_documents=True)
        return
    try:
        chains = experiment.chains(stage)
    except KeyError as error:
        found = f"a stage that needs what is chosen for {error.args[0]}, which is not tuned yet"
        raise InputError([Problem("--stage", stage.name, found, "the stages before it first")]) from None
    if options.task is None or options.task >= len(chains):
        found = "none" if options.task is None else str(options.task)
        raise InputError([Problem("--task", "K", found, f"a number from 0 to {len(chains) - 1}")])
    chain = chains[options.task]
    if problems := [problem for job in chain.jobs for problem in changes_of(job)]:
        raise InputError(problems)
    record_uses(ledger_path(setup.output), uses_of(setup, stage.kind))
    runner.pool.run([chain])


def submit_arrays(experiment: DeclaredExperiment, stages: list[Stage], options: ExperimentOptions) -> None:
    """Write the batch scripts, and submit them if that is asked for.

    Raises:
        PhaseFailed: `sbatch` refused a job.
    """
    command = [sys.executable, "tools/experiment.py", str(options.spec), "--ranks", str(options.num_ranks)]
    command += ["--output", str(options.output)] if options.output is not None else []
    command += ["--only", *options.only] if options.only else []
    command += ["--reuse-report-split"] * options.may_reuse_report_split
    command += ["--set", *options.overrides] if options.overrides else []
    submit = write_arrays(experiment, stages, command, options.sbatch_options or ())
    if options.submits:
        PhaseRunner(REPOSITORY, say).run("submit", ["bash", str(submit)])
    else:
        say(f"bash {shlex.quote(str(submit))} submits the stages")


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


def stages_until(experiment: DeclaredExperiment, name: str | None) -> list[Stage]:
    """The stages up to one.

    Raises:
        InputError: there is no such stage.
    """
    names = [stage.name for stage in experiment.stages]
    if name is not None and name not in names:
        raise InputError([Problem("--until", "STAGE", name, f"a stage: {', '.join(names)}")])
    return experiment.stages if name is None else experiment.stages[: names.index(name) + 1]
