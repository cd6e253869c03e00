"""Run an experiment that a file declares: tune, train, evaluate and report on its arms; run again, it resumes."""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C in the imports ends them without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ebft_mega.apps.experiment.running.program import ExperimentOptions, run_experiment
from ebft_mega.io.arguments import ToolParser, output_directory, path_argument, whole_number
from ebft_mega.io.command import add_overrides_option, add_permissions_option, run_command


def parse_arguments() -> ExperimentOptions:
    """Read the command line."""
    parser = ToolParser(description=__doc__)
    option = parser.add_argument
    option("spec", type=path_argument, metavar="SPEC.yaml", help="the experiment; docs/experiments.md lists its keys")
    option("--output", type=output_directory, help="directory of all results (default: output_dir of the file)")
    option("--jobs", type=whole_number(), help="runs at a time (default: as many as the cores have room for)")
    option("--ranks", type=whole_number(), default=1, help="processes of each run (default %(default)s)")
    option("--until", metavar="STAGE", help="stop after a stage; --plan lists them")
    option("--only", nargs="+", default=[], metavar="ARM", help="run these arms, and what they start from")
    option("--plan", action="store_true", help="print the stages, the runs, their steps and FLOPs, and stop")
    option("--fresh", action="store_true", help="set the results that are there aside (in previous/) and begin anew")
    option("--fresh-evaluations", action="store_true", help="set the evaluations aside alone, and evaluate anew")
    option(
        "--reuse-report-split",
        action="store_true",
        help="report on a split that was reported on before, in another experiment; the report says so",
    )
    slurm = parser.add_argument_group("as Slurm arrays, a job for each stage and a task for each run")
    slurm.add_argument("--slurm", action="store_true", help="write the batch scripts; options of sbatch may follow --")
    slurm.add_argument("--submit", action="store_true", help="with --slurm: submit them, too")
    slurm.add_argument("--stage", metavar="STAGE", help="run one task of a stage, as the scripts do")
    slurm.add_argument("--task", type=whole_number(0), metavar="K", help="with --stage: its number")
    add_overrides_option(parser, "set a key of every run and evaluation, such as train.max_steps=2")
    add_permissions_option(parser)
    given, separator, sbatch_options = split_at_dashes(sys.argv[1:])
    arguments = parser.parse_args(given)
    for name, needed in (("submit", "slurm"), ("task", "stage")):
        if getattr(arguments, name) not in (None, False) and not getattr(arguments, needed):
            parser.error(f"--{name} goes with --{needed}")
    if separator and not arguments.slurm:
        parser.error("options of sbatch, after --, go with --slurm")
    return ExperimentOptions(
        spec=arguments.spec,
        output=arguments.output,
        jobs=arguments.jobs,
        num_ranks=arguments.ranks,
        until=arguments.until,
        only=tuple(arguments.only),
        is_plan=arguments.plan,
        is_fresh=arguments.fresh,
        has_fresh_evaluations=arguments.fresh_evaluations,
        may_reuse_report_split=arguments.reuse_report_split,
        overrides=tuple(arguments.overrides),
        stage=arguments.stage,
        task=arguments.task,
        sbatch_options=tuple(sbatch_options) if arguments.slurm else None,
        submits=arguments.submit,
    )


def split_at_dashes(arguments: list[str]) -> tuple[list[str], bool, list[str]]:
    """What stands before `--` on a command line, whether there is one, and what stands after it."""
    if "--" not in arguments:
        return arguments, False, []
    place = arguments.index("--")
    return arguments[:place], True, arguments[place + 1 :]


def main() -> None:
    """Run the stages; the exit code is that of the command that failed."""
    run_experiment(parse_arguments())


if __name__ == "__main__":
    sys.exit(run_command(main))
