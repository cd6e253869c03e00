"""Train a small model on real code with strided EBFT and compare it with its warm start and with CE-only."""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C in the imports ends them without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ebft_mega.apps.study.arms import WARM_START, WORKSPACE, ArmResult, Experiment, Scale
from ebft_mega.apps.study.commands import add_runner_options, phase_runner
from ebft_mega.io.arguments import ToolParser, real_number
from ebft_mega.io.command import add_overrides_option, run_command

ROOT = Path(__file__).resolve().parents[1]
# Wall time of the configured steps on two quiet cores, and the part of it that does not depend on the number of steps
# (starting processes, building the data).
FULL_SECONDS = 400.0
FIXED_SECONDS = 90.0
FULL_ROWS = 256
LEAST_ROWS = 16


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ToolParser(description=__doc__)
    parser.add_argument(
        "--budget-seconds",
        type=real_number(),
        default=FULL_SECONDS,
        help="wall time to aim at on two quiet cores; scales the steps of every phase (default %(default)g)",
    )
    add_overrides_option(parser, "set a key of every training run, such as parallel.tensor_parallel_size=2")
    add_runner_options(parser)
    return parser.parse_args()


def scale_for(budget_seconds: float) -> Scale:
    """Compute the share of the configured work that fits into a budget of wall seconds."""
    factor = max(0.0, (budget_seconds - FIXED_SECONDS) / (FULL_SECONDS - FIXED_SECONDS))
    return Scale(factor, evaluation_rows=max(LEAST_ROWS, round(FULL_ROWS * min(1.0, factor))))


def report(results: dict[str, ArmResult]) -> Path:
    """Write the page that compares the arms."""
    # Draws plots, which --help should not wait for.
    from ebft_mega.apps.report.arm_comparison import write_comparison

    return write_comparison(
        {arm: ROOT / result.evaluation for arm, result in results.items()},
        ROOT / WORKSPACE,
        reference=WARM_START,
        arm_facts={arm: result.facts for arm, result in results.items()},
        links={f"run report: {arm}": ROOT / result.run / "report.html" for arm, result in results.items()},
        notes=(
            "Settings were chosen on the tuning split; the rows reported on are from the validation split, "
            "other packages, which no choice has looked at.",
            "EBFT and CE-only start from the same weights and see the same rows in the same order.",
        ),
    )


def main() -> None:
    """Run all phases; the exit code is that of the phase that failed."""
    arguments = parse_arguments()
    started = time.monotonic()
    runner = phase_runner(arguments, ROOT)
    experiment = Experiment(
        runner,
        WORKSPACE,
        WORKSPACE / "data",
        arguments.ranks,
        scale_for(arguments.budget_seconds),
        overrides=tuple(arguments.overrides),
    )
    page = report(experiment.run_arms("validation"))
    print(f"\nWall time by phase:\n{runner.summary()}")
    print(f"\n{time.monotonic() - started:.0f} s in all. Report: {page.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(run_command(main))
