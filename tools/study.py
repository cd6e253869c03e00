"""The quickstart's three arms over several seeds, aggregated with the spread between seeds."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ebft_mega.apps.study.arms import (
    WARM_START,
    WORKSPACE,
    Experiment,
    Scale,
    default_num_ranks,
    thread_environment,
)
from ebft_mega.apps.study.phases import PhaseRunner
from ebft_mega.errors import EbftError

ROOT = Path(__file__).resolve().parents[1]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--output", type=Path, default=Path("runs/study"), help="default: %(default)s")
    parser.add_argument(
        "--split",
        choices=("tuning", "validation"),
        default="validation",
        help="held-out rows: tuning to choose settings, validation to report (default)",
    )
    parser.add_argument("--rows", type=int, default=256, help="held-out rows (default %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the configured steps (default 1)")
    parser.add_argument("--ranks", type=int, default=default_num_ranks(), help="processes (default %(default)s)")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="for the EBFT arm only",
    )
    parser.add_argument("--fresh", action="store_true", help="reuse nothing from an earlier run")
    return parser.parse_args()


def main() -> int:
    """Run all seeds; the exit code is that of the phase that failed."""
    arguments = parse_arguments()
    runner = PhaseRunner(
        ROOT,
        say=lambda text: print(text, flush=True),
        environment=thread_environment(arguments.ranks),
        fresh=arguments.fresh,
    )
    evaluations: dict[int, dict[str, Path]] = {}
    try:
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
    except EbftError as error:
        print(f"\n{error}", file=sys.stderr)
        return error.exit_code
    print(f"\nWall time by phase:\n{runner.summary()}\n\nReport: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
