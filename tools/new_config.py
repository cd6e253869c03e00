"""Write a commented configuration for a model, its data and a machine: batch, layout and reuse of rollouts fit them."""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C in the imports ends them without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ebft_mega.io.arguments import (
    ToolParser,
    add_new_file_option,
    output_file,
    path_argument,
    real_number,
    require_new_file,
    whole_number,
)
from ebft_mega.io.command import add_permissions_option, run_command
from ebft_mega.io.standard_streams import print_line
from ebft_mega.runtime.launch_environment import MAX_PROCESSES

REPOSITORY = Path(__file__).resolve().parents[1]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ToolParser(description=__doc__)
    parser.add_argument(
        "--model",
        type=path_argument,
        required=True,
        help="Hugging Face directory. Without weights in it (only config.json) the model is random, with the "
        "vocabulary of the data",
    )
    parser.add_argument("--data", type=path_argument, required=True, help="dataset directory of tools/build_shards.py")
    parser.add_argument("--held-out", type=path_argument, help="dataset for evaluations (default: no evaluation)")
    parser.add_argument("--output", type=output_file, required=True, metavar="FILE.yaml", help="file to write")
    parser.add_argument(
        "--gpus", type=whole_number(1, MAX_PROCESSES), metavar="N", help="GPUs to train on (default: this machine's)"
    )
    parser.add_argument(
        "--gpu-memory",
        type=real_number(above=True, most=1e6),
        metavar="GB",
        help="memory of each in 1e9 bytes (default: that of this machine's GPUs; without any, its processor is used)",
    )
    add_permissions_option(parser)
    add_new_file_option(parser)
    arguments = parser.parse_args()
    require_new_file(parser, arguments)
    return arguments


def main() -> None:
    """Choose, write the file, and print what to do next."""
    arguments = parse_arguments()
    from ebft_mega.apps.starter.starter_config import Request, write_starter_config

    request = Request(
        model=arguments.model,
        data=arguments.data,
        held_out=arguments.held_out,
        output=arguments.output,
        gpus=arguments.gpus,
        gpu_gigabytes=arguments.gpu_memory,
    )
    output = arguments.output
    written = write_starter_config(request, REPOSITORY)
    for note in written.notes:
        print_line(f"note: {note}")
    print_line(str(output), sys.stdout)
    config = shlex.quote(os.path.relpath(output, REPOSITORY))
    print_line(f"next, in {REPOSITORY}: python launcher/train.py --config {config} {written.plan_options}", sys.stdout)


if __name__ == "__main__":
    sys.exit(run_command(main))
