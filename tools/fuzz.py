"""Try damaged and hostile input on every parser: each case is read or refused, quickly, and nothing else happens.

    python tools/fuzz.py --cases 500 --seed 0
    python tools/fuzz.py --parser tar --seed 0 --only 17   # one case again

Cases are mutations of valid files, of which at least a third have the right syntax. Exit code 1: a case raised
something else than a refusal, took more than 5 s or more than 512 MB of memory, started a program, or wrote where it
should not; the files of such cases are saved with `--output`. A library that crashes ends the tool; what it was at is
then in `ebft-fuzz-*/current` of /dev/shm or /tmp.

Columns: `cases` run; `past syntax`, the share of them that a plain parser of the format accepts; how many were `read`
and `refused`; seconds of the `slowest`; by how much `memory` grew at its peak; cases `a second`.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C in the imports ends them without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import faulthandler
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ebft_mega.apps.fuzzing.campaign import Tally
from ebft_mega.apps.fuzzing.fuzzed_parsers import PARSERS
from ebft_mega.apps.fuzzing.processes import run_campaign
from ebft_mega.apps.fuzzing.summary import TITLES, figures, save_failures, shortcomings, verdict
from ebft_mega.errors import EXIT_DONE, EXIT_FAILED
from ebft_mega.io.arguments import ToolParser, output_directory, whole_number
from ebft_mega.io.command import run_command
from ebft_mega.io.standard_streams import print_line


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    names = [parser.name for parser in PARSERS]
    # A name stays whole where a line ends.
    listed = textwrap.fill(f"parsers: {', '.join(names)}", 118, break_on_hyphens=False)
    parser = ToolParser(description=__doc__, epilog=listed, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--cases", type=whole_number(), help="of each parser (default 500)")
    option("--total", type=whole_number(), help="cases of all parsers together, instead of --cases")
    option("--seed", type=whole_number(0), default=0, help="decides the cases (default %(default)s)")
    option("--parser", nargs="+", choices=names, metavar="NAME", help="only these of the list below")
    option("--only", type=whole_number(0), metavar="NUMBER", help="one case alone, and what became of it")
    option("--processes", type=whole_number(1, 256), default=1, help="at a time (default %(default)s)")
    option("--output", type=output_directory, metavar="DIR", help="directory for the files of cases that fail")
    arguments = parser.parse_args()
    if arguments.cases is not None and arguments.total is not None:
        parser.error("--cases and --total exclude each other")
    return arguments


def main() -> int:
    """Run the cases and print what became of them."""
    arguments = parse_arguments()
    faulthandler.enable()
    chosen = [parser for parser in PARSERS if arguments.parser is None or parser.name in arguments.parser]
    cases = arguments.cases or -(-(arguments.total or 500 * len(chosen)) // len(chosen))
    numbers = range(cases) if arguments.only is None else range(arguments.only, arguments.only + 1)
    tallies: list[Tally] = []
    print(TITLES, flush=True)
    for tally in run_campaign(chosen, arguments.seed, numbers, arguments.processes):
        tallies.append(tally)
        print(figures(tally), flush=True)
        if arguments.output is not None:
            save_failures(tally, arguments.output)
    found = shortcomings(tallies, of_one_case=arguments.only is not None)
    for line in found or verdict(tallies, arguments.seed, arguments.only):
        print_line(line)
    return EXIT_FAILED if found else EXIT_DONE


if __name__ == "__main__":
    sys.exit(run_command(main))
