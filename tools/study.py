"""Train the three arms of the quickstart over several seeds, and report means and the spread between seeds."""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C in the imports ends them without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ebft_mega.apps.study.arms import WARM_START, WORKSPACE, Experiment, Scale
from ebft_mega.apps.study.commands import add_runner_options, phase_runner
from ebft_mega.io.arguments import ToolParser, output_directory, real_number, whole_number
from ebft_mega.io.command import add_overrides_option, run_command
from ebft_mega.io.standard_streams import print_line

ROOT = Path(__file__).resolve().parents[1]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ToolParser(description=__doc__)
    parser.add_argument("--seeds", type=whole_number(0), nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--output", type=output_directory, default="runs/study", help="default: %(default)s")
    parser.add_argument(
        "--split",
        choices=("tuning", "validation"),
        default="validation",
        help="held-out rows: tuning to choose settings, validation to report (default)",
    )
    parser.add_argument("--rows", type=whole_number(), default=256, help="held-out rows (default %(default)s)")
    parser.add_argument(
        "--scale", type=real_number(above=True), default=1.0, help="share of the configured steps (default 1)"
    )
    add_overrides_option(parser, "set a key of the EBFT arm only")
    add_runner_options(parser)
    return parser.parse_args()


def main() -> None:
    """Run all seeds; the exit code is that of the phase that failed."""
    arguments = parse_arguments()
    runner = phase_runner(arguments, ROOT)
    evaluations: dict[int, dict[str, Path]] = {}
    for seed in arguments.seeds:
        experiment = Experiment(
            runner,
            workspace=arguments.output / f"seed-{seed}",
            data=WORKSPACE / "data",
            num_ranks=arguments.ranks,
            scale=Scale(arguments.scale, arguments.rows),
            seed=seed,
            ebft_overrides=tuple(arguments.overrides),
        )
        results = experiment.run_arms(arguments.split)
        evaluations[seed] = {arm: ROOT / result.evaluation for arm, result in results.items()}
    # Draws plots, which --help should not wait for.
    from ebft_mega.apps.report.seeds import write_study

    notes = [f"Rows of the {arguments.split} split."]
    if arguments.overrides:
        notes.append(f"EBFT arm changed by: {', '.join(arguments.overrides)}.")
    page = write_study(evaluations, ROOT / arguments.output, WARM_START, notes)
    print(f"\nWall time by phase:\n{runner.summary()}\n")
    print_line(f"Report: {page}", sys.stdout)


if __name__ == "__main__":
    sys.exit(run_command(main))
