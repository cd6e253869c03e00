"""Train a small model on real code with strided EBFT and compare it with its warm start and with cross-entropy."""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C in the imports ends them without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ebft_mega.apps.experiment.running.commands import default_num_ranks
from ebft_mega.apps.experiment.running.program import ExperimentOptions, run_experiment
from ebft_mega.io.arguments import ToolParser, real_number, whole_number
from ebft_mega.io.command import add_overrides_option, run_command

ROOT = Path(__file__).resolve().parents[1]
SPEC = ROOT / "configs" / "experiments" / "quickstart.yaml"
# Wall time of the configured steps on two quiet cores, and the part of it that does not depend on the number of steps
# (starting processes, building the data).
FULL_SECONDS = 600.0
FIXED_SECONDS = 140.0
FULL_ROWS = 160
LEAST_ROWS = 16


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ToolParser(description=__doc__)
    parser.add_argument(
        "--budget-seconds",
        type=real_number(),
        default=FULL_SECONDS,
        help="wall time to aim at on two quiet cores; scales the steps of every run (default %(default)g)",
    )
    add_overrides_option(parser, "set a key of every training run, such as parallel.tensor_parallel_size=2")
    parser.add_argument(
        "--ranks", type=whole_number(), default=default_num_ranks(), help="processes of a run (default %(default)s)"
    )
    parser.add_argument("--fresh", action="store_true", help="reuse nothing from an earlier run")
    return parser.parse_args()


def share_of_steps(budget_seconds: float) -> float:
    """The share of the configured steps that fits into a budget of wall seconds."""
    return max(0.0, (budget_seconds - FIXED_SECONDS) / (FULL_SECONDS - FIXED_SECONDS))


def evaluation_rows(share: float) -> int:
    """Rows of the report split beside a share of the steps."""
    return max(LEAST_ROWS, round(FULL_ROWS * min(1.0, share)))


def main() -> None:
    """Run all stages of the experiment; the exit code is that of the command that failed."""
    arguments = parse_arguments()
    started = time.monotonic()
    share = share_of_steps(arguments.budget_seconds)
    run_experiment(
        ExperimentOptions(
            spec=SPEC,
            num_ranks=arguments.ranks,
            overrides=tuple(arguments.overrides),
            is_fresh=arguments.fresh,
            # It shows the machine; nothing is claimed from its report split that a second run could spoil.
            may_reuse_report_split=True,
            sets_changes_aside=True,
            steps_share=share,
            rows=evaluation_rows(share),
        )
    )
    print(f"{time.monotonic() - started:.0f} s in all.")


if __name__ == "__main__":
    sys.exit(run_command(main))
