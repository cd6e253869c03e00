"""Compare evaluated models: differences on the same rows, with paired bootstrap intervals."""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C in the imports ends them without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ebft_mega.errors import InputError, Problem
from ebft_mega.io.arguments import ToolParser, output_directory, path_argument
from ebft_mega.io.command import add_permissions_option, run_command
from ebft_mega.io.standard_streams import print_line


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ToolParser(description=__doc__)
    parser.add_argument(
        "--arm",
        dest="arms",
        action="append",
        required=True,
        metavar="NAME=PATH",
        help="an arm's name and its evaluation.json, or the directory holding it; give at least two",
    )
    parser.add_argument("--reference", help="arm that the others are compared with (default: the first)")
    parser.add_argument(
        "--output", type=output_directory, required=True, help="directory of report.html and comparison.json"
    )
    add_permissions_option(parser)
    return parser.parse_args()


def read_arms(texts: list[str], reference: str | None) -> dict[str, Path]:
    """Turn `NAME=PATH` texts into paths by name.

    Raises:
        InputError: a text of another form, a name given twice, fewer than two arms, an unknown reference.
    """
    problems = []
    arms: dict[str, Path] = {}
    for text in texts:
        name, separator, path = text.partition("=")
        if not (name and separator and path):
            problems.append(Problem("command line", "--arm", repr(text), "NAME=PATH"))
        elif name in arms:
            problems.append(Problem("command line", "--arm", f"{name!r} twice", "different names"))
        else:
            try:
                arms[name] = path_argument(path)
            except argparse.ArgumentTypeError as error:
                problems.append(Problem("command line", f"--arm {name}", repr(path), f"a path: {error}"))
    if len(texts) < 2:
        problems.append(Problem("command line", "--arm", f"{len(texts)} arm", "at least two"))
    if reference is not None and reference not in arms:
        problems.append(Problem("command line", "--reference", repr(reference), f"one of {', '.join(arms)}"))
    if problems:
        raise InputError(problems)
    return arms


def main() -> None:
    """Write the page and print its path."""
    arguments = parse_arguments()
    arms = read_arms(arguments.arms, arguments.reference)
    # Draws plots, which --help should not wait for.
    from ebft_mega.apps.report.arm_comparison import write_comparison

    print_line(f"Report: {write_comparison(arms, arguments.output, arguments.reference)}", sys.stdout)


if __name__ == "__main__":
    sys.exit(run_command(main))
