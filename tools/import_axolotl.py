"""Make a configuration of an axolotl file for strided EBFT; what is not taken over is listed with the reason."""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C in the imports ends them without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ebft_mega.config.axolotl.axolotl_import import import_axolotl
from ebft_mega.io.arguments import (
    ToolParser,
    add_new_file_option,
    output_file,
    path_argument,
    require_new_file,
    whole_number,
)
from ebft_mega.io.command import add_permissions_option, run_command
from ebft_mega.io.standard_streams import print_line
from ebft_mega.runtime.launch_environment import MAX_PROCESSES


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ToolParser(description=__doc__)
    parser.add_argument("--input", type=path_argument, required=True, metavar="FILE.yml", help="axolotl's file")
    parser.add_argument("--output", type=output_file, required=True, metavar="FILE.yaml", help="file to write")
    parser.add_argument(
        "--gpus",
        type=whole_number(1, MAX_PROCESSES),
        default=1,
        metavar="N",
        help="that the file was used on: its batch is one of each (default: 1)",
    )
    parser.add_argument(
        "--data-tokens", type=whole_number(), metavar="N", help="of the data, for num_epochs without max_steps"
    )
    add_permissions_option(parser)
    add_new_file_option(parser)
    arguments = parser.parse_args()
    require_new_file(parser, arguments)
    return arguments


def main() -> None:
    """Translate, write the file, and print what was left out and what is to be supplied."""
    arguments = parse_arguments()
    translation = import_axolotl(arguments.input, arguments.output, arguments.gpus, arguments.data_tokens)
    for line in translation.left_out:
        print_line(f"not here: {line}")
    for line in translation.to_supply:
        print_line(f"to be supplied: {line}")
    print_line(str(arguments.output), sys.stdout)


if __name__ == "__main__":
    sys.exit(run_command(main))
