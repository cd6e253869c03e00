"""What `tools/experiment.py` does: check everything, then run the stages. No torch."""

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from ebft_mega.apps.experiment.declared.spec_file import read_spec
from ebft_mega.apps.experiment.declared.spec_rules import names_in, spec_problems
from ebft_mega.apps.experiment.running.experiment_runner import ExperimentRunner
from ebft_mega.apps.experiment.running.job_pool import JobPool
from ebft_mega.apps.experiment.runs.arm_plans import combinations, main_trials
from ebft_mega.apps.experiment.runs.command_lines import CommandLines, ToolCommands
from ebft_mega.apps.experiment.runs.declared_experiment import DeclaredExperiment
from ebft_mega.apps.experiment.runs.stages import Stage
from ebft_mega.apps.experiment.runs.trial_runs import ExperimentSetup, evaluation_config, trial_config
from ebft_mega.apps.experiment.trials import Choice, Trial
from ebft_mega.apps.study.commands import thread_environment
from ebft_mega.apps.study.phases import PhaseRunner
from ebft_mega.errors import ConfigError, InputError, Problem
from ebft_mega.io.expanded_paths import REPOSITORY
from ebft_mega.io.standard_streams import print_line
from ebft_mega.lifecycle.findings import PREVIOUS
from ebft_mega.lifecycle.setting_aside import DATE_FORMAT

LOCK_NAME = ".experiment.lock"


@dataclass(frozen=True)
class ExperimentOptions:
    """What the command line asks for."""

    spec: Path
    jobs: int | None = None
    num_ranks: int = 1
    until: str | None = None
    only: tuple[str, ...] = ()
    is_plan: bool = False
    is_fresh: bool = False
    may_reuse_report_split: bool = False
    overrides: tuple[str, ...] = ()


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
    file = read_spec(options.spec, spec_problems)
    setup = ExperimentSetup(file, options.overrides, options.num_ranks)
    problems = [*names_in(options.only, setup.spec), *configuration_problems(setup)]
    if problems:
        raise ConfigError(problems)
    runner = make_runner(setup, options, commands or ToolCommands())
    wanted = stages_until(runner, options.until)
    with experiment_lock(setup.output):
        if options.is_fresh:
            set_aside(setup.output)
        require_unchanged(runner)
        for stage in wanted:
            runner.run(stage)
            if stage.kind == "prepare":
                require_unchanged(runner)


def make_runner(setup: ExperimentSetup, options: ExperimentOptions, commands: CommandLines) -> ExperimentRunner:
    """The runner that the options ask for."""
    environment = thread_environment(os.cpu_count() or 1)
    jobs = options.jobs or max(1, (os.cpu_count() or 1) // options.num_ranks)
    if shutil.which("nvidia-smi"):
        jobs, environment = options.jobs or 1, thread_environment(options.num_ranks)
    pool = JobPool(jobs, say, environment)
    experiment = DeclaredExperiment(setup, commands, options.only)
    return ExperimentRunner(experiment, pool, PhaseRunner(REPOSITORY, say), say)


def stages_until(runner: ExperimentRunner, name: str | None) -> list[Stage]:
    """The stages up to one.

    Raises:
        InputError: there is no such stage.
    """
    stages = runner.experiment.stages
    names = [stage.name for stage in stages]
    if name is not None and name not in names:
        raise InputError([Problem("--until", "STAGE", name, f"a stage: {', '.join(names)}")])
    return stages if name is None else stages[: names.index(name) + 1]


def configuration_problems(setup: ExperimentSetup) -> Iterator[Problem]:
    """What the run configurations of all trials refuse, before anything starts."""
    seen: set[str] = set()
    try:
        evaluation_config(setup)
    except ConfigError as error:
        yield from (each for each in error.problems if not (str(each) in seen or seen.add(str(each))))  # type: ignore[func-returns-value]
    stand_ins: Mapping[str, Choice] = {
        name: combinations(plan.tune)[0] for name, plan in setup.plans.items() if plan.tune
    }
    for name, plan in setup.plans.items():
        if plan.model is not None:
            continue
        for choice in combinations(plan.tune):
            (trial, *_) = main_trials(plan, setup.spec, {**stand_ins, name: choice})
            try:
                trial_config(setup, trial, stand_ins)
            except ConfigError as error:
                for problem in error.problems:
                    if str(problem) not in seen:
                        seen.add(str(problem))
                        yield _placed(setup, trial, problem)


def _placed(setup: ExperimentSetup, trial: Trial, problem: Problem) -> Problem:
    """A problem of a configuration, with the line of the experiment that sets its key."""
    for holder in ("set", "tune"):
        key = f"arms.{trial.arm}.{holder}.{problem.key}"
        if key in setup.file.lines:
            return replace(problem, where=setup.file.place(key))
    return problem.within(setup.file.place(f"arms.{trial.arm}"))


def require_unchanged(runner: ExperimentRunner) -> None:
    """Refuse a grid of which some runs were made from something else.

    Raises:
        InputError: which runs, and what has changed.
    """
    problems, setup = runner.experiment.changes(), runner.experiment.setup
    if problems:
        output = setup.output
        expected = f"what they were made from, or --fresh, which sets {output} aside in {output / PREVIOUS}"
        ways = Problem(str(setup.file.path), "output_dir", f"{output} with runs of something else", expected)
        raise InputError([*problems, ways])


@contextmanager
def experiment_lock(output: Path) -> Iterator[None]:
    """Hold the experiment's directory; the system releases it however the process ends.

    Raises:
        InputError: another process runs the experiment.
    """
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / LOCK_NAME, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        found = "another process that runs this experiment"
        raise InputError([Problem(str(output), "output_dir", found, "one process at a time")]) from None
    try:
        yield
    finally:
        lock.release()


def set_aside(output: Path) -> None:
    """Move everything in an experiment's directory into a folder of `previous/`; nothing is deleted."""
    found = [item for item in output.iterdir() if item.name not in (PREVIOUS, LOCK_NAME)]
    if not found:
        return
    aside = output / PREVIOUS / f"{datetime.now(UTC):{DATE_FORMAT}}"
    aside.mkdir(parents=True)
    for item in found:
        item.rename(aside / item.name)
    say(f"what was in {output} is set aside in {aside}")
