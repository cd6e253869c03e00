"""The main job: reads and checks a configuration, then prints the plan (`--dry-run`) or trains."""

import argparse
import os
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))  # works without an installed package, too

from ebft_mega.config.load import load_config  # noqa: E402
from ebft_mega.config.planner import describe_run  # noqa: E402
from ebft_mega.config.validate import check_run  # noqa: E402
from ebft_mega.errors import EbftError, InputProblems  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    """Read the command line; an unknown option ends the program with exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    option = parser.add_argument
    option("--config", type=Path, required=True, help="YAML file; docs/configuration.md lists its keys")
    option("--set", dest="overrides", metavar="KEY=VALUE", nargs="+", action="extend", default=[],
           help="set a key, such as train.lr=1e-5; may be given again")  # fmt: skip
    option("--dry-run", action="store_true", help="print the plan and the memory table, and stop")
    option("--world-size", type=int, metavar="N", help="number of processes that --dry-run plans for")
    option("--trace-step", type=Path, metavar="DIR", help="run one optimizer step and write its trace")
    option("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # added by launchers
    arguments = parser.parse_args()
    if arguments.world_size is not None and (arguments.world_size < 1 or not arguments.dry_run):
        parser.error("--world-size is a positive number and goes with --dry-run")
    return arguments


def main() -> int:
    """Run the job and return the exit code."""
    arguments = parse_arguments()
    is_first_rank = os.environ.get("RANK", "0") == "0"
    trace_step = arguments.trace_step and arguments.trace_step.absolute()
    try:
        config = load_config(arguments.config, arguments.overrides)
        os.chdir(REPOSITORY)  # where the relative paths of a configuration start
        plan = check_run(config, arguments.world_size or int(os.environ.get("WORLD_SIZE", "1")))
        if arguments.dry_run:
            if is_first_rank:
                print(describe_run(config, plan))
            return 0
        from ebft_mega.train.run import run_training

        return run_training(config, plan, trace_step)
    except EbftError as error:
        if is_first_rank or not isinstance(error, InputProblems):  # all ranks find the same bad input
            print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
